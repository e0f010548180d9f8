"""The lanes that are measured side by side, and the agents whose CPU time is counted.

Each mesh has a testbed of its own, alike but for who carries the pods' traffic,
and all of them stand at the same time, so that a round measures one lane after
the other on the machine as it is at that moment.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.bench import load
from tests.peers.ztunnel import Ztunnel, ZtunnelBuild
from tests.progs.pod import Family
from tests.testbed import Testbed

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
DIRECT, OURS, THEIRS = "no mesh", "meshbpf", "ztunnel"
ROWS = {
    "out-of-mesh": ("n1a", "n2x"),
    "same-node": ("n1a", "n1b"),
    "cross-node": ("n1a", "n2a"),
}
SERVERS = ("n1b", "n2a", "n2x")
WARM_UP_S = 0.3


@dataclass(frozen=True, slots=True)
class Lane:
    """From one pod to another, and the processes in between."""

    mesh: str
    row: str
    bed: Testbed
    client: str
    target: str
    agents: tuple[int, ...]
    """Their process ids."""

    @property
    def name(self) -> str:
        return f"{self.mesh} {self.row}"


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement: the figure, the generator's whole answer, and what the agents spent."""

    task: str
    mesh: str
    row: str
    round: int
    figure: float
    answer: dict[str, float]
    cpu_s: float
    cpu_per_unit: float


@contextlib.contextmanager
def standing(tag: str, build: ZtunnelBuild | None, family: Family) -> Iterator[list[Lane]]:
    """All lanes: agents running, pods attached, servers up, every tunnel used once."""
    with contextlib.ExitStack() as stack:
        lanes = _meshbpf(stack.enter_context(Testbed(tag)))
        if build is not None:
            lanes += _ztunnel(stack.enter_context(Testbed(f"{tag}z")), build, stack)
        for lane in lanes:
            for task in load.TASKS:
                take(lane, task, 0, WARM_UP_S, family)
        yield lanes


def take(lane: Lane, task: load.Task, number: int, seconds: float, family: Family) -> Sample:
    """Measure one task on one lane."""
    before = sum(map(cpu_time_s, lane.agents))
    target = lane.bed[lane.target].address(family)
    answer = load.measure(lane.bed, lane.bed[lane.client], target, task, seconds)
    spent = sum(map(cpu_time_s, lane.agents)) - before
    per_unit = spent / answer[task.count] * task.per
    return Sample(
        task.name, lane.mesh, lane.row, number, answer[task.figure], answer, spent, per_unit
    )


def cpu_time_s(pid: int) -> float:
    """User and system time of a process with all its threads, and of its children."""
    # The second field is the command in brackets, which may hold anything.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = (int(fields[11]) + int(fields[12])) * TICK_S
    children = [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    return own + sum(map(cpu_time_s, children))


def _meshbpf(bed: Testbed) -> list[Lane]:
    bed.start_agents()
    bed.attach_all()
    for name in SERVERS:
        load.serve(bed, bed[name])
    agents = tuple(agent.pid for agent in bed.agents.values())
    return [
        Lane(DIRECT, "direct", bed, "n1x", "n2x", ()),
        *(Lane(OURS, row, bed, *ends, agents) for row, ends in ROWS.items()),
    ]


def _ztunnel(bed: Testbed, build: ZtunnelBuild, stack: contextlib.ExitStack) -> list[Lane]:
    nodes = {node: stack.enter_context(Ztunnel(bed, node, build)) for node in (1, 2)}
    for ztunnel in nodes.values():
        ztunnel.start()
    for pod in bed.captured:
        nodes[pod.node].attach(pod)
    for name in SERVERS:
        load.serve(bed, bed[name])
    agents = tuple(ztunnel.pid for ztunnel in nodes.values())
    return [Lane(THEIRS, row, bed, *ends, agents) for row, ends in ROWS.items()]
