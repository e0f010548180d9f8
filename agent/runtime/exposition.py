"""Metrics on the wire: Prometheus' text format 0.0.4 and OpenMetrics 1.0.

Our own 100 lines instead of prometheus-client: four counters with 27 labels
cost it 20 us of CPU a connection where `traffic_metrics.py` takes 6.5, finding
the labels' values included; it cannot expire a series by what it belongs to;
and its exposition walks Sample objects where we join prepared strings.

A family's name has no suffix; `_total` of counters is put on where the format
wants it. Help texts end with a stop, as ztunnel's do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})
_QUALITY = re.compile(r";\s*q=([0-9.]+)\s*$")


class Kind(StrEnum):
    """What a number may do."""

    COUNTER = "counter"  # it only grows
    GAUGE = "gauge"
    HISTOGRAM = "histogram"  # its samples come from `histogram_samples`


@dataclass(frozen=True, slots=True)
class Family:
    """Samples of one name. Each sample is its labels, as `label_text` wrote them, and a number."""

    name: str
    help: str
    kind: Kind
    samples: Iterable[tuple[str, int | float]]


def single(name: str, told: str, kind: Kind, value: int | float) -> Family:
    """A family of one sample without labels."""
    return Family(name, told, kind, (("", value),))


def label_text(names: Iterable[str], values: Iterable[str]) -> str:
    """`{a="x",b="y"}`; values come from the mesh and may hold anything."""
    pairs = ",".join(
        f'{name}="{value.translate(_ESCAPES)}"' for name, value in zip(names, values, strict=True)
    )
    return f"{{{pairs}}}" if pairs else ""


def labelled(name: str, told: str, kind: Kind, label: str, of: Mapping[str, int | float]) -> Family:
    """A family with one label, a sample for each of its values."""
    return Family(
        name, told, kind, [(label_text((label,), (value,)), of[value]) for value in sorted(of)]
    )


def histogram_samples(
    names: Iterable[str],
    values: Iterable[str],
    bounds: Sequence[float],
    buckets: Sequence[int],
    total: float,
) -> Iterator[tuple[str, int | float]]:
    """The samples of one series of a histogram family, with their suffixes.

    `buckets` counts what fell between one bound and the next, and has one
    more for what was above them all.
    """
    names, values, count = tuple(names), tuple(values), 0
    for bound, found in zip((*map(_number, map(float, bounds)), "+Inf"), buckets, strict=True):
        count += found
        yield "_bucket" + label_text((*names, "le"), (*values, bound)), count
    labels = label_text(names, values)
    yield "_sum" + labels, total
    yield "_count" + labels, count


def wants_openmetrics(accept: str) -> bool:
    """Whether a scraper that sends this Accept header prefers OpenMetrics to text."""
    best = {"application/openmetrics-text": 0.0, "text/plain": 0.0}
    for entry in accept.split(","):
        kind = entry.split(";")[0].strip().lower()
        found = _QUALITY.search(entry)
        quality = min(1.0, float(found[1])) if found and found[1].count(".") < 2 else 1.0
        if kind in best:
            best[kind] = max(best[kind], quality)
    openmetrics = best["application/openmetrics-text"]
    return openmetrics > 0.0 and openmetrics >= best["text/plain"]


def render(family: Family, *, openmetrics: bool) -> str:
    """The lines of one family."""
    total = family.name + "_total" if family.kind is Kind.COUNTER else family.name
    headed = family.name if openmetrics else total
    lines = [f"# HELP {headed} {_help(family.help)}.", f"# TYPE {headed} {family.kind}"]
    lines += [f"{total}{labels} {_number(value)}" for labels, value in family.samples]
    lines.append("")
    return "\n".join(lines)


END = "# EOF\n"
"""Closes an OpenMetrics exposition."""


def _help(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _number(value: int | float) -> str:
    return str(value) if isinstance(value, int) else repr(float(value))
