"""The disk of a node is full: what runs goes on, and what cannot be kept is refused.

An attach that cannot be written down must not claim to have happened; once
there is room again it works, and the agent was never restarted.
"""

from vagrant.testbed import PODS, Testbed, expect

_FILL = "/var/testbed-fill"


def run(bed: Testbed) -> None:
    node, database = bed.node1, PODS["shop/db"]["ipv4"]
    before = node.unit("meshbpf", "MainPID")
    # To the last block, also of root's reserve.
    node.try_run(f"dd if=/dev/zero of={_FILL} bs=1M; dd if=/dev/zero of={_FILL}2 bs=512")
    try:
        expect(node.ready(), "the agent is not ready on a full disk")
        bed.expect_echo("shop/web", database)
        node.try_run("meshbpf detach --pod shop/guest")
        told = node.try_run("meshbpf attach --pod shop/guest")
        listed = "shop/guest" in node.run("meshbpf pods")
        expect(told.returncode != 0, "an attach that could not be written down succeeded")
        expect(not listed, f"attach said {told.stderr}, and the pod is listed")
        bed.expect_echo("shop/web", database)
    finally:
        node.run(f"rm -f {_FILL} {_FILL}2")
    node.run("meshbpf attach --pod shop/guest")
    expect(node.unit("meshbpf", "MainPID") == before, "the agent was restarted")
