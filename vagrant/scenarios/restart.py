"""`systemctl restart meshbpf` under traffic refuses no connection.

On the server's node, then on the client's. Listeners wait in systemd's
descriptor store, so a connection that comes meanwhile is slow, not refused.
"""

import time

from vagrant.testbed import ECHO, PODS, Testbed, expect

_HANDSHAKE_S = 10.0
"""What the client's agent gives a tunnel's handshake, here and in ztunnel. An emulated node may
take longer to start an agent; a connection that waited all that time is then given up."""


def run(bed: Testbed) -> None:
    for node in (bed.node2, bed.node1):
        before = node.unit("meshbpf", "MainPID")
        with bed.traffic("shop/web", PODS["shop/db"]["ipv4"], ECHO) as traffic:
            began = time.monotonic()
            node.run("systemctl restart meshbpf", limit_s=600)
            took_s = time.monotonic() - began
            bed.expect_echo("shop/web", PODS["shop/db"]["ipv4"])
        expect(node.unit("meshbpf", "MainPID") != before, "it was not restarted")
        report = traffic.report
        expect(report["done"] > 0, f"no connection at all: {report}")
        given_up = [one for one in report["first"] if one["seconds"] >= _HANDSHAKE_S]
        expect(
            report["failed"] == (len(given_up) if took_s > _HANDSHAKE_S else 0),
            f"restart on {node.name}, {took_s:.0f} s: {report}",
        )
