"""`make bench-attach`: how long attaching takes, and what an agent with many pods weighs.

    python -m tests.bench.attach [--pods 100]

One agent of the testbed; pods are attached one after the other over its
control socket, as a CNI plugin does it. Prints what was asked for beside each
figure, one JSON object on the last line; exit 1 when something was missed.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from meshbpf.agent.api import AttachRequest, DetachRequest
from tests.bench import rig
from tests.progs.pod import NAMESPACE, Pod
from tests.testbed import SUITE_TAG, Agent, Testbed

NODE = 1
AGAIN = 20
"""Warm attaches of one pod, one after the other, after all the others."""
ALL_S, WARM_S, RESIDENT_MIB = 5.0, 0.060, 90.0
"""What 100 pods may take, one more, and the agent's resident memory then."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.attach", description=__doc__)
    parser.add_argument("--pods", type=int, default=100)
    parser.add_argument("--tag", default=f"{SUITE_TAG}p", help="of the testbed")
    options = parser.parse_args()
    with Testbed(options.tag) as bed:
        pods = [bed.make_pod(f"p{i}", NODE, "many", captured=True) for i in range(options.pods)]
        bed.write_mesh()
        bed.start_agents()
        figures = measure(bed.agents[NODE], pods)
    asked = {
        "attach_all_s": ALL_S * options.pods / 100,
        "warm_attach_p50_s": WARM_S,
        "compiles_after_first": 0,
        "resident_mib": RESIDENT_MIB,
    }
    missed = [key for key, most in asked.items() if figures[key] > most]
    for key, figure in figures.items():
        wanted = (
            f", at most {asked[key]:g}: {'MISSED' if key in missed else 'met'}"
            if key in asked
            else ""
        )
        print(f"{key}: {figure:g}{wanted}")
    print(json.dumps(figures))
    return 1 if missed else 0


def measure(agent: Agent, pods: list[Pod]) -> dict[str, float]:
    """All pods attached, then one of them again and again."""
    idle_mib = resident_mib(agent.pid)
    first_s = _timed(lambda: _attach(agent, pods[0]))
    compiled = _compiled(agent)
    spent_s = rig.cpu_time_s(agent.pid)
    rest_s = [_timed(lambda pod=pod: _attach(agent, pod)) for pod in pods[1:]]
    spent_s = rig.cpu_time_s(agent.pid) - spent_s
    warm_s = []
    for _ in range(AGAIN):
        agent.ask(DetachRequest(pod=pods[-1].key))
        warm_s.append(_timed(lambda: _attach(agent, pods[-1])))
    return {
        "pods": len(pods),
        "attach_first_s": round(first_s, 4),
        "attach_all_s": round(first_s + sum(rest_s), 3),
        "cpu_per_attach_s": round(spent_s / max(len(rest_s), 1), 4),
        "warm_attach_p50_s": round(statistics.median(warm_s), 4),
        "warm_attach_max_s": round(max(warm_s), 4),
        "compiles_after_first": len(_compiled(agent) - compiled),
        "idle_mib": round(idle_mib, 1),
        "resident_mib": round(resident_mib(agent.pid), 1),
    }


def resident_mib(pid: int) -> float:
    """What the process has in memory, with what it shares with others."""
    found = re.search(r"^VmRSS:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) / 1024


def _attach(agent: Agent, pod: Pod) -> None:
    result = agent.ask(AttachRequest(pod=f"{NAMESPACE}/{pod.name}", netns=pod.netns))
    assert result.outcome == "attached", result


def _compiled(agent: Agent) -> set[tuple[str, int]]:
    """What the compiler has written: one more compile would add a file, or write one anew."""
    cache = agent.state_dir / "cache"
    return {(each.name, each.stat().st_mtime_ns) for each in cache.rglob("*") if each.is_file()}


def _timed(work: Callable[[], None]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main())
