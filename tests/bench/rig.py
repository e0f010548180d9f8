"""The lanes that are measured side by side, and the agents whose CPU time is counted.

Each mesh has a testbed of its own, alike but for who carries the pods' traffic,
and all of them stand at the same time, so that a round measures one lane after
the other on the machine as it is at that moment.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench import load
from tests.peers.ztunnel import Ztunnel, ZtunnelBuild, start_steering, wait_served
from tests.progs.pod import Family
from tests.testbed import Testbed

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
DIRECT, OURS, THEIRS = "no mesh", "meshbpf", "ztunnel"
STEERED = "steered ztunnel"
"""ztunnel behind our steering, in place of the iptables rules that it has otherwise."""
MESHES = (OURS, THEIRS, STEERED)
BESIDE = "n1y"
"""A pod that is not captured on the node of n1x, which `standing` adds: for no mesh on one node."""


@dataclass(frozen=True, slots=True)
class Row:
    """From one captured pod to another pod, and the pair that has the same path without a mesh."""

    name: str
    client: str
    target: str
    direct: tuple[str, str]
    by_vip: bool = False
    """The client dials the service of the target; there is no such thing without a mesh."""


SAME_NODE, BETWEEN_NODES = ("n1x", BESIDE), ("n1x", "n2x")
ROWS = (
    Row("same-node", "n1a", "n1b", SAME_NODE),
    Row("out-of-mesh", "n1a", "n2x", BETWEEN_NODES),
    Row("cross-node", "n1a", "n2a", BETWEEN_NODES),
    Row("same-node VIP", "n1a", "n1b", SAME_NODE, by_vip=True),
    Row("cross-node VIP", "n1a", "n2a", BETWEEN_NODES, by_vip=True),
)
BY_ADDRESS = tuple(row for row in ROWS if not row.by_vip)
DIRECT_ROWS = {SAME_NODE: "one node", BETWEEN_NODES: "two nodes"}
"""What the lanes without a mesh are called."""
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
    by_vip: bool = False

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
def standing(
    tag: str,
    build: ZtunnelBuild | None,
    family: Family,
    rows: Sequence[Row] = ROWS,
    tasks: Sequence[load.Task] = load.TASKS,
    warm_up_s: float = WARM_UP_S,
) -> Iterator[list[Lane]]:
    """All lanes: agents running, pods attached, servers up, every tunnel used once."""
    with contextlib.ExitStack() as stack:
        lanes = _meshbpf(stack.enter_context(Testbed(tag)), rows)
        if build is not None:
            lanes += _ztunnel(stack.enter_context(Testbed(f"{tag}z")), build, stack, rows)
            lanes += _steered(stack.enter_context(Testbed(f"{tag}s")), build, stack, rows)
        for lane in lanes:
            for task in tasks:
                take(lane, task, 0, warm_up_s, family)
        yield lanes


def take(lane: Lane, task: load.Task, number: int, seconds: float, family: Family) -> Sample:
    """Measure one task on one lane."""
    before = sum(map(cpu_time_s, lane.agents))
    pod = lane.bed[lane.target]
    target = pod.vip(family) if lane.by_vip else pod.address(family)
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


def _meshbpf(bed: Testbed, rows: Sequence[Row]) -> list[Lane]:
    bed.add_pod(BESIDE, 1, "legacy", captured=False)
    bed.start_agents()
    bed.attach_all()
    direct = list(dict.fromkeys(row.direct for row in rows))
    _serve(bed, [target for _, target in direct] + [row.target for row in rows])
    agents = tuple(agent.pid for agent in bed.agents.values())
    return [
        *(Lane(DIRECT, DIRECT_ROWS[ends], bed, *ends, ()) for ends in direct),
        *_lanes(OURS, bed, rows, agents),
    ]


def _ztunnel(
    bed: Testbed, build: ZtunnelBuild, stack: contextlib.ExitStack, rows: Sequence[Row]
) -> list[Lane]:
    nodes = {node: stack.enter_context(Ztunnel(bed, node, build)) for node in (1, 2)}
    for ztunnel in nodes.values():
        ztunnel.start()
    for pod in bed.captured:
        nodes[pod.node].attach(pod)
    _serve(bed, [row.target for row in rows])
    return _lanes(THEIRS, bed, rows, tuple(ztunnel.pid for ztunnel in nodes.values()))


def _steered(
    bed: Testbed, build: ZtunnelBuild, stack: contextlib.ExitStack, rows: Sequence[Row]
) -> list[Lane]:
    start_steering(bed)
    nodes = [stack.enter_context(Ztunnel.of_agent(bed, node, build)) for node in (1, 2)]
    for ztunnel in nodes:
        ztunnel.start()
    bed.attach_all()
    for node in (1, 2):
        wait_served(bed, node)
    _serve(bed, [row.target for row in rows])
    agents = (*(ztunnel.pid for ztunnel in nodes), *(agent.pid for agent in bed.agents.values()))
    return _lanes(STEERED, bed, rows, agents)


def _serve(bed: Testbed, names: Sequence[str]) -> None:
    for name in dict.fromkeys(names):
        load.serve(bed, bed[name])


def _lanes(mesh: str, bed: Testbed, rows: Sequence[Row], agents: tuple[int, ...]) -> list[Lane]:
    return [Lane(mesh, row.name, bed, row.client, row.target, agents, row.by_vip) for row in rows]
