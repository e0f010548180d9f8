"""Kernel 6.1 with cgroup v2 alone: no tcx, so TC programs sit in clsact filters.

The connect hooks are in force all the same, `meshbpf check` says what the
kernel lacks and what follows, and a detach leaves neither filter nor qdisc.
"""

import json

from vagrant.testbed import HERE, PODS, Testbed, expect

GOLDEN = HERE / "golden" / "check.txt"


def run(bed: Testbed) -> None:
    node = bed.node1
    release = node.run("uname -r").strip()
    expect(release.startswith("6.1."), f"the box has kernel {release}")
    kind = node.run("stat -fc %T /sys/fs/cgroup").strip()
    expect(kind == "cgroup2fs", f"/sys/fs/cgroup is a {kind}")

    checked = node.run("meshbpf check || [ $? -eq 79 ]")
    # Kernel, system and capture; what follows is this testbed's, not the kernel's.
    told = "\n\n".join(checked.split("\n\n")[:3]) + "\n"
    expect(told == GOLDEN.read_text(), f"check says, unlike {GOLDEN}:\n{told}")
    in_force = node.status()["capture"]["in_force"]
    expect(in_force == "connect+tc", f"capture in force is {in_force}")

    expect(_filters(bed, "shop/guest") > 0, "no clsact filter on the pod's interface")
    node.run("meshbpf detach --pod shop/guest")
    try:
        expect(_filters(bed, "shop/guest") == 0, "a filter is left after the detach")
        bed.expect_echo("shop/guest", PODS["shop/legacy"]["ipv4"])
    finally:
        node.run("meshbpf attach --pod shop/guest")


def _filters(bed: Testbed, pod: str) -> int:
    """TC filters of ours on the pod's own interface."""
    command = bed.in_pod(pod, "tc -j filter show dev eth0 egress")
    return len(json.loads(bed.node_of(pod).run(command) or "[]"))
