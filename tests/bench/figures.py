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
from tests.bench.rig import DIRECT, DIRECT_ROWS, MESHES, OURS, ROWS, STEERED, THEIRS, Sample


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
    """What a row's ratio must be, to ztunnel or to no mesh."""

    base: str
    task: str
    row: str
    bound: float
    less_is_better: bool = False
    cost: bool = False
    """The ratio of CPU per unit, not of the figure."""

    def met(self, ratio: Spread) -> bool:
        """Missed only when the whole interquartile range is on the wrong side."""
        return ratio.low <= self.bound if self.less_is_better else ratio.high >= self.bound

    def verdict(self, ratio: Spread | None) -> str:
        wanted = f"{'at most' if self.less_is_better else 'at least'} {self.bound:g}"
        if ratio is None:
            return f"{wanted}: not measured"
        return f"{wanted}: {'met' if self.met(ratio) else 'MISSED'}"


STREAMS = tuple(task.name for task in TASKS if task.mode == "stream")


def _targets(
    base: str, row: str, throughput: float, latency: float, connections: float
) -> list[Target]:
    return [
        *(Target(base, task, row, throughput) for task in STREAMS),
        Target(base, "rtt", row, latency, less_is_better=True),
        Target(base, "rate", row, connections),
    ]


TARGETS = (
    *_targets(THEIRS, "same-node", 5.0, 0.15, 2.0),
    *_targets(THEIRS, "same-node VIP", 5.0, 0.15, 2.0),
    *_targets(THEIRS, "out-of-mesh", 2.5, 0.2, 2.0),
    *_targets(THEIRS, "cross-node", 1.2, 1.0, 1.0),
    *(Target(THEIRS, task, "cross-node", 1.0, less_is_better=True, cost=True) for task in STREAMS),
    # Carried by the kernel: what there is without a mesh, but for measuring errors.
    *_targets(DIRECT, "same-node", 0.95, 1.05, 0.95),
    *_targets(DIRECT, "same-node VIP", 0.95, 1.05, 0.95),
    *_targets(DIRECT, "out-of-mesh", 0.95, 1.05, 0.95),
)


def of_lane(samples: Iterable[Sample], task: str, mesh: str, row: str) -> dict[int, Sample]:
    """The samples of one lane and task, by round."""
    return {
        sample.round: sample
        for sample in samples
        if (sample.task, sample.mesh, sample.row) == (task, mesh, row)
    }


def ratio(ours: dict[int, Sample], base: dict[int, Sample], *, cost: bool = False) -> Spread | None:
    """Ours to the other's, round by round; None when no round has both."""
    pairs = [(ours[number], base[number]) for number in sorted(ours.keys() & base.keys())]
    ratios = [
        one.cpu_per_unit / other.cpu_per_unit if cost else one.figure / other.figure
        for one, other in pairs
        if not cost or other.cpu_per_unit
    ]
    return Spread.of(ratios) if ratios else None


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
    for base in (DIRECT, THEIRS):
        if any(sample.mesh == base for sample in samples):
            parts += [f"## Beside {base}", _beside(samples, base)]
    if any(sample.mesh == STEERED for sample in samples):
        parts += [f"## {STEERED} beside {THEIRS}", _beside(samples, THEIRS, STEERED)]
    parts.append(
        "For round trips and CPU a smaller ratio is better. A target is missed when the whole "
        "range between the quartiles is on the wrong side of it."
    )
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
    lanes = [(DIRECT, name) for name in DIRECT_ROWS.values()]
    lanes += [(mesh, row.name) for row in ROWS for mesh in MESHES]
    rows = []
    for mesh, row in lanes:
        lane = of_lane(samples, task.name, mesh, row)
        if not lane:
            continue
        figure = Spread.of([sample.figure for sample in lane.values()])
        cost = Spread.of([sample.cpu_per_unit for sample in lane.values()])
        rows.append(
            [
                f"{row}, {mesh}",
                number(figure.median),
                spread(figure),
                number(cost.median) if mesh != DIRECT else "",
                spread(cost) if mesh != DIRECT else "",
            ]
        )
    return table(("path", task.unit, "quartiles", task.cost, "quartiles"), rows)


def _beside(samples: Sequence[Sample], base: str, mesh: str = OURS) -> str:
    targets = {
        (target.task, target.row, target.cost): target
        for target in TARGETS
        if target.base == base and mesh == OURS
    }
    rows = []
    for task in TASKS:
        for row in ROWS:
            ours = of_lane(samples, task.name, mesh, row.name)
            named = DIRECT_ROWS[row.direct] if base == DIRECT else row.name
            theirs = of_lane(samples, task.name, base, named)
            for cost in (False, True):
                found = ratio(ours, theirs, cost=cost)
                if found is None:
                    continue
                target = targets.get((task.name, row.name, cost))
                rows.append(
                    [
                        f"{task.title}, {row.name}{', CPU' if cost else ''}",
                        number(found.median),
                        spread(found),
                        target.verdict(found) if target is not None else "",
                    ]
                )
    return table((f"{mesh} to {base}", "median ratio", "quartiles", "asked for"), rows)
