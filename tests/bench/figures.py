"""From samples to the page that people read: medians, quartiles, ratios of one round.

A round measures every lane once, within seconds of each other. What is
compared is therefore the ratio of two lanes in the same round, and the median
of these ratios: the machine's moods, which move all lanes alike, drop out.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.bench.load import TASKS, Task
from tests.bench.rig import DIRECT, OURS, ROWS, THEIRS, Sample


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of so many values."""

    low: float
    median: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, median, high, len(values))


@dataclass(frozen=True, slots=True)
class Target:
    """What a row's ratio to ztunnel must be."""

    task: str
    row: str
    bound: float

    def met(self, ratio: Spread, task: Task) -> bool:
        return ratio.median <= self.bound if task.less_is_better else ratio.median >= self.bound


TARGETS = (
    Target("up", "cross-node", 0.8),
    Target("down", "cross-node", 0.8),
    Target("rtt", "cross-node", 3.3),
    Target("rate", "cross-node", 0.3),
)


def of_lane(samples: Iterable[Sample], task: str, mesh: str, row: str) -> dict[int, Sample]:
    """The samples of one lane and task, by round."""
    return {
        sample.round: sample
        for sample in samples
        if (sample.task, sample.mesh, sample.row) == (task, mesh, row)
    }


def ratio(ours: dict[int, Sample], base: dict[int, Sample]) -> Spread | None:
    """Ours to the other's, round by round; None when no round has both."""
    shared = sorted(ours.keys() & base.keys())
    if not shared:
        return None
    return Spread.of([ours[number].figure / base[number].figure for number in shared])


def page(samples: Sequence[Sample], facts: Sequence[tuple[str, str]], command: str) -> str:
    """The whole result as Markdown."""
    parts = [
        "# Benchmark",
        f"Written by `{command}`; how it measures and what it cannot say is in "
        "[performance.md](../performance.md).",
        table(("", ""), facts),
    ]
    measured = {sample.task for sample in samples}
    for task in [each for each in TASKS if each.name in measured]:
        parts += [f"## {task.title}", _figures(samples, task)]
    if any(sample.mesh == THEIRS for sample in samples):
        parts += ["## Beside ztunnel", *_beside(samples)]
    return "\n\n".join(parts) + "\n"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; every column but the first is aligned right."""
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def spread(value: Spread) -> str:
    return f"{number(value.low)} to {number(value.high)}"


def _figures(samples: Sequence[Sample], task: Task) -> str:
    lanes = [(DIRECT, "direct")] + [(mesh, row) for row in ROWS for mesh in (OURS, THEIRS)]
    direct = of_lane(samples, task.name, DIRECT, "direct")
    rows = []
    for mesh, row in lanes:
        lane = of_lane(samples, task.name, mesh, row)
        if not lane:
            continue
        figure = Spread.of([sample.figure for sample in lane.values()])
        cost = Spread.of([sample.cpu_per_unit for sample in lane.values()])
        of_direct = ratio(lane, direct)
        rows.append(
            [
                f"{row}, {mesh}" if mesh != DIRECT else "direct, no mesh",
                number(figure.median),
                spread(figure),
                number(of_direct.median) if of_direct and mesh != DIRECT else "",
                number(cost.median) if mesh != DIRECT else "",
            ]
        )
    return table(("path", task.unit, "quartiles", "to direct", task.cost), rows)


def _beside(samples: Sequence[Sample]) -> list[str]:
    targets = {(target.task, target.row): target for target in TARGETS}
    rows = []
    for task in TASKS:
        for row in ROWS:
            found = ratio(
                of_lane(samples, task.name, OURS, row), of_lane(samples, task.name, THEIRS, row)
            )
            if found is None:
                continue
            target = targets.get((task.name, row))
            wanted = ""
            if target is not None:
                sign = "at most" if task.less_is_better else "at least"
                verdict = "met" if target.met(found, task) else "MISSED"
                wanted = f"{sign} {target.bound:g}: {verdict}"
            rows.append([f"{task.title}, {row}", number(found.median), spread(found), wanted])
    heads = ("meshbpf to ztunnel, in the same round", "median ratio", "quartiles", "target")
    return [
        table(heads, rows),
        "For round trips a smaller ratio is better.",
    ]
