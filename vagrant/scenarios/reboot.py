"""A node reboots: agent, pods and capture come back with nobody's help."""

from vagrant.testbed import ECHO, PODS, WHOAMI, Testbed, eventually, expect

_BOOT_S = 600.0


def run(bed: Testbed) -> None:
    node, database = bed.node2, PODS["shop/db"]["ipv4"]
    before = node.boot_id()
    node.try_run("systemctl reboot")
    node.forget()

    def is_back() -> bool:
        return node.boot_id() not in ("", before)

    eventually("the node boots", is_back, _BOOT_S)
    eventually("its agent is ready", node.ready, 300)
    eventually(
        "its pods are there", lambda: node.unit("testbed-pods", "ActiveState") == "active", 300
    )
    eventually(
        "traffic flows again", lambda: "error" not in bed.call("shop/web", database, ECHO), 180
    )
    seen = bed.call("shop/web", database, WHOAMI)
    expect(seen["peer"] == PODS["shop/web"]["ipv4"], f"db saw {seen}")
    carried = node.status()["pods"]["attached"]
    expect(carried == 1, f"{carried} pods are attached")
