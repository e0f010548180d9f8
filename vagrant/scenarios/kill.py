"""`kill -9` of the agent: its pods fail closed at once, and come back by themselves.

While it is gone a new connection into the mesh is refused and does not hang,
nothing of it is on the link in the clear, and destinations outside the mesh
are reached; systemd starts the agent anew, and it takes its pods over.
"""

from vagrant.testbed import ECHO, PODS, Testbed, eventually, expect

_HANG_S = 30.0
"""An emulated node's idea of "at once" for what takes 1 ms."""


def run(bed: Testbed) -> None:
    node, database = bed.node1, PODS["shop/db"]["ipv4"]
    restarts = int(node.unit("meshbpf", "NRestarts"))
    watch = bed.node2.start(f"python3 /opt/testbed/watch.py {ECHO}")
    assert watch.stdout is not None
    expect(watch.stdout.readline() == "watching\n", "the link cannot be watched")
    with bed.traffic("shop/web", database, ECHO) as traffic:
        node.run("systemctl kill --kill-who=main --signal=KILL meshbpf")
        bed.expect_echo("shop/web", PODS["shop/legacy"]["ipv4"])
        eventually(
            "systemd starts the agent anew",
            lambda: int(node.unit("meshbpf", "NRestarts")) > restarts and node.ready(),
            300,
        )
        eventually(
            "traffic flows again", lambda: "error" not in bed.call("shop/web", database, ECHO), 60
        )
    bed.node2.run("touch /run/testbed-watched")
    plain, _ = watch.communicate(timeout=60)[0].split()
    # The call to legacy, which is outside the mesh, is plain; TEXT is in one packet of each way.
    report = traffic.report
    expect(report["done"] > 0, f"no connection at all: {report}")
    expect(report["slowest_s"] < _HANG_S, f"a connection hung: {report}")
    expect(int(plain) < 40, f"{plain} plain packets on the link")
