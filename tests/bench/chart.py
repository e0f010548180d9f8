"""The figures of a run as one SVG drawing, written by hand: a panel a task, a bar a lane."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from tests.bench import figures
from tests.bench.load import TASKS, Task
from tests.bench.rig import DIRECT, DIRECT_ROWS, MESHES, OURS, ROWS, STEERED, THEIRS, Sample

WIDTH, LEFT, RIGHT = 760, 130, 110
BAR, GAP, HEAD, FOOT = 13, 7, 44, 14
# Told apart also without colour: they differ in lightness.
COLOURS = {DIRECT: "#9aa5b1", OURS: "#1f6feb", THEIRS: "#d9a441", STEERED: "#8a5a00"}
BACKGROUND, INK = "#ffffff", "#1f2328"


def draw(samples: Sequence[Sample]) -> str:
    """The whole drawing; lanes and tasks that were not measured are left out."""
    parts: list[str] = []
    y = 40
    for task in TASKS:
        if any(sample.task == task.name for sample in samples):
            y = _panel(parts, samples, task, y)
    x = LEFT
    for mesh, colour in COLOURS.items():
        parts.insert(0, _rect(x, 14, 12, 12, colour) + _text(x + 18, 24, mesh))
        x += 110
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" '
        f'viewBox="0 0 {WIDTH} {y}" font-family="sans-serif" font-size="12" fill="{INK}">'
        f"<title>meshbpf, ztunnel and no mesh side by side: medians</title>"
        f"{_rect(0, 0, WIDTH, y, BACKGROUND)}\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _panel(parts: list[str], samples: Sequence[Sample], task: Task, y: int) -> int:
    better = "less is better" if task.less_is_better else "more is better"
    parts.append(_text(16, y + 24, f"{task.title}, {task.unit} ({better})", bold=True))
    y += HEAD
    groups = [(name, ((DIRECT, name),)) for name in DIRECT_ROWS.values()]
    groups += [(row.name, tuple((mesh, row.name) for mesh in MESHES)) for row in ROWS]
    medians = {
        (mesh, row): figures.Spread.of([sample.figure for sample in lane.values()]).median
        for _, lanes in groups
        for mesh, row in lanes
        if (lane := figures.of_lane(samples, task.name, mesh, row))
    }
    scale = (WIDTH - LEFT - RIGHT) / max(medians.values())
    for name, lanes in groups:
        bars = [(mesh, medians[mesh, row]) for mesh, row in lanes if (mesh, row) in medians]
        if not bars:
            continue
        parts.append(_text(LEFT - 8, y + BAR - 2, name, anchor="end"))
        for mesh, value in bars:
            width = max(value * scale, 1.0)
            parts.append(_rect(LEFT, y, width, BAR, COLOURS[mesh]))
            parts.append(_text(LEFT + width + 6, y + BAR - 2, figures.number(value)))
            y += BAR + 1
        y += GAP
    return y + FOOT


def _rect(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:.1f}" height="{height:g}" fill="{colour}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:g}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'
