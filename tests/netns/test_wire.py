"""What an observer of the nodes and of their link sees, and what is not there."""

from __future__ import annotations

import pytest

from tests.netns.talk import MARKER, passes, receive
from tests.progs import server
from tests.progs.inside import nftables, xtables
from tests.progs.pod import Family
from tests.progs.sniffer import Sniffer
from tests.testbed import Testbed

pytestmark = [pytest.mark.root, pytest.mark.netns]

HBONE = 15008


def test_only_hbone_crosses_between_nodes_and_no_plaintext(bed: Testbed, family: Family) -> None:
    markers = (MARKER, b"220 n2a ready", b"220 n1b ready")
    with Sniffer(bed.node_netns(1), "trunk", markers) as sniffer:
        passes(bed, bed["n1a"], bed["n2a"].address(family))
        passes(bed, bed["n2b"], bed["n1b"].address(family))
        passes(bed, bed["n1b"], bed["n2a"].vip(family), 80)
        with bed.connect(bed["n1a"], bed["n2a"].address(family), server.GREET) as sock:
            receive(sock, 5)
    seen = sniffer.seen
    assert seen.tcp_service_ports() == {HBONE}
    assert "udp" not in seen.protocols()
    assert seen.plaintext == []


def test_inside_a_node_the_kernel_carries_where_connects_are_seen_and_hbone_elsewhere(
    bed: Testbed, family: Family
) -> None:
    source, destination = bed["n1a"], bed["n1b"]
    passes(bed, source, destination.address(family))  # the agent's, which then knows the pair
    with Sniffer(bed.node_netns(1), destination.veth, (MARKER,)) as sniffer:
        passes(bed, source, destination.address(family))
    by_kernel = "auto" in bed.agents[1].options
    ports = sniffer.seen.tcp_service_ports()  # a tunnel that stands says PING all the same
    assert (server.ECHO in ports) is by_kernel
    assert bool(sniffer.seen.plaintext) is by_kernel


def test_out_of_the_mesh_goes_as_the_application_sent_it(bed: Testbed, family: Family) -> None:
    client, target = bed["n1a"].address(family), bed["n2x"].address(family)
    with Sniffer(bed.node_netns(1), "trunk", (MARKER,)) as sniffer:
        passes(bed, bed["n1a"], target)
    # Tunnels of other pairs may say PING meanwhile; nobody but this client dials.
    assert sniffer.seen.dials == {(client, target, server.ECHO): 1}
    assert {packet.source for packet in sniffer.seen.plaintext} == {client, target}


def test_streams_of_one_client_share_a_tunnel(bed: Testbed, family: Family) -> None:
    source, destination = bed["n2a"], bed["n1a"]
    passes(bed, source, destination.address(family))
    with Sniffer(bed.node_netns(1), "trunk") as sniffer:
        for _ in range(20):
            passes(bed, source, destination.address(family))
    assert sniffer.seen.dials == {}


def test_an_exempt_port_is_left_alone_in_both_directions(bed: Testbed, family: Family) -> None:
    source, destination = bed["n1a"], bed["n2a"]
    with bed.connect(source, destination.address(family), server.EXEMPT) as sock:
        sock.sendall(MARKER)
        assert receive(sock, len(MARKER)) == MARKER
        carried = bed.agents[1].carried() + bed.agents[2].carried()
        port = f":{server.EXEMPT}"
        assert [one for one in carried if one.destination.endswith(port)] == []


def test_no_netfilter_rule_exists_anywhere(bed: Testbed) -> None:
    names = [bed.node_netns(1), bed.node_netns(2), *(pod.netns for pod in bed.pods.values())]
    assert {name: nftables(name) + xtables(name) for name in names} == {name: [] for name in names}


def test_the_check_for_rules_would_find_one(plain: Testbed) -> None:
    netns = plain["n1a"].netns
    plain.run(netns, ["nft", "add", "table", "inet", "meshbpf_test"])
    try:
        assert nftables(netns) == ["meshbpf_test"]
    finally:
        plain.run(netns, ["nft", "delete", "table", "inet", "meshbpf_test"])
