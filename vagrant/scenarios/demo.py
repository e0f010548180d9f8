"""The main job: a captured pod on one node talks to one on the other.

It goes over HBONE and nothing of it is readable on the link; the server sees
the client's own address, by IPv4 and IPv6 and by the service's; a pod whose
identity the policy refuses is not let in; a pod outside the mesh is reached as
it is; and no node has a netfilter rule of ours.
"""

from vagrant.testbed import ECHO, HBONE, PODS, SERVICE, WHOAMI, Testbed, expect


def run(bed: Testbed) -> None:
    watch = bed.node2.start(f"python3 /opt/testbed/watch.py {ECHO} {WHOAMI} {HBONE}")
    assert watch.stdout is not None
    expect(watch.stdout.readline() == "watching\n", "the link cannot be watched")
    for family in ("ipv4", "ipv6"):
        seen = bed.call("shop/web", PODS["shop/db"][family], WHOAMI)
        expect(
            seen.get("peer") == PODS["shop/web"][family]
            and seen.get("local") == PODS["shop/db"][family],
            f"db saw {seen}",
        )
        bed.expect_echo("shop/web", PODS["shop/db"][family])
    bed.expect_echo("shop/web", SERVICE, 80)
    bed.node2.run("touch /run/testbed-watched")
    packets = watch.communicate(timeout=60)[0].split()
    # In the order of the ports above, then packets with readable text.
    expect(packets[0] == packets[1] == "0", f"plain packets on the link: {packets}")
    expect(int(packets[2]) > 0 and packets[3] == "0", f"HBONE and readable packets: {packets}")

    refused = bed.call("shop/guest", PODS["shop/db"]["ipv4"], ECHO)
    expect("error" in refused, f"the policy lets the guest in: {refused}")
    bed.expect_echo("shop/web", PODS["shop/legacy"]["ipv4"])
    bed.expect_echo("shop/legacy", PODS["shop/web"]["ipv4"])
    for node in bed.nodes:
        rules = node.run("iptables-save 2>/dev/null; ip6tables-save 2>/dev/null; nft list ruleset")
        expect("-A" not in rules and "chain" not in rules, f"{node.name} has rules:\n{rules}")
