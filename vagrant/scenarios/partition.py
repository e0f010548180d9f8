"""A partition between the nodes: calls across end with an error, and heal by themselves.

Packets vanish in one direction, as behind a dead switch: nobody is told. Both
agents stay ready, and pods of one node still reach each other.
"""

from vagrant.testbed import ECHO, PODS, Testbed, eventually, expect

# The pods of node1, by halves of their networks: longer prefixes than the routes to them.
_CUT = "ip route {0} blackhole 198.18.1.0/25; ip -6 route {0} blackhole fd00:6d62:1::/65"
_LIMIT_S = 60.0


def run(bed: Testbed) -> None:
    database = PODS["shop/db"]["ipv4"]
    bed.expect_echo("shop/web", database)
    bed.node2.run(_CUT.format("add"))
    try:
        answer = bed.call("shop/web", database, ECHO, limit_s=_LIMIT_S)
        expect("error" in answer, f"packets go through the partition: {answer}")
        expect(answer["seconds"] < _LIMIT_S, f"the agent never gave up: {answer}")
        bed.expect_echo("shop/legacy", database)
        for node in bed.nodes:
            expect(node.ready(), f"the agent of {node.name} is not ready any more")
    finally:
        bed.node2.run(_CUT.format("del"))
    eventually(
        "traffic flows again", lambda: "error" not in bed.call("shop/web", database, ECHO), 90
    )
