"""`systemctl restart meshbpf` under traffic refuses no connection.

On the server's node, then on the client's. Listeners wait in systemd's
descriptor store, so a connection that comes meanwhile is slow, not refused.
"""

from vagrant.testbed import ECHO, PODS, Testbed, expect


def run(bed: Testbed) -> None:
    for node in (bed.node2, bed.node1):
        before = node.unit("meshbpf", "MainPID")
        with bed.traffic("shop/web", PODS["shop/db"]["ipv4"], ECHO) as traffic:
            node.run("systemctl restart meshbpf", limit_s=600)
            bed.expect_echo("shop/web", PODS["shop/db"]["ipv4"])
        expect(node.unit("meshbpf", "MainPID") != before, "it was not restarted")
        report = traffic.report
        expect(report["done"] > 0, f"no connection at all: {report}")
        expect(report["failed"] == 0, f"restart on {node.name}: {report}")
