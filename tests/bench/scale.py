"""`make bench-scale`: what open connections weigh, as their number grows.

    python -m tests.bench.scale [--most 4000]

Connections from a pod of one node to a pod of the other are opened and held,
each with a round trip done; at each step the resident memory of both agents
and the CPU time per new connection are noted. One JSON object on the last
line. docs/scale.md holds what came of it, beside what others measure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import sys

from tests.bench import load, rig
from tests.bench.attach import resident_mib
from tests.testbed import SUITE_TAG, Testbed

STEPS = (0, 250, 500, 1000, 2000, 4000, 8000)
MESSAGE = b"E" + bytes(64)
"""`E` asks load.c for its echo."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.scale", description=__doc__)
    parser.add_argument("--most", type=int, default=4000)
    parser.add_argument("--tag", default=f"{SUITE_TAG}s", help="of the testbed")
    options = parser.parse_args()
    steps = [step for step in STEPS if step <= options.most]
    with Testbed(options.tag) as bed, contextlib.ExitStack() as held:
        bed.start_agents()
        bed.attach_all()
        load.serve(bed, bed["n2a"])
        curve = []
        before = 0
        for step in steps:
            spent = [-rig.cpu_time_s(agent.pid) for agent in bed.agents.values()]
            for _ in range(step - before):
                held.enter_context(_connection(bed))
            spent = [
                a + rig.cpu_time_s(b.pid) for a, b in zip(spent, bed.agents.values(), strict=True)
            ]
            mib = [round(resident_mib(agent.pid), 1) for agent in bed.agents.values()]
            each_us = [round(1e6 * s / max(step - before, 1)) for s in spent]
            curve.append({"connections": step, "resident_mib": mib, "cpu_us_each": each_us})
            print(
                f"{step} connections: {mib} MiB at the two nodes, {each_us} us of CPU for each new"
            )
            before = step
    print(json.dumps({"connections": curve}))
    return 0


def _connection(bed: Testbed) -> socket.socket:
    sock = bed.connect(bed["n1a"], bed["n2a"].ipv4, load.PORT, limit_s=20.0)
    sock.sendall(MESSAGE)
    want = len(MESSAGE) - 1  # the first byte is load.c's
    while want:
        want -= len(sock.recv(want))
    return sock


if __name__ == "__main__":
    sys.exit(main())
