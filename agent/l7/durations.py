"""Durations as Kubernetes and Istio objects write them: `5s`, `1m30s`, `0.5s`, `250ms`."""

from __future__ import annotations

import re

from meshbpf.agent.l7.spec import Value

_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|us|ns|h|m|s)")
_UNITS_S = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


def duration_s(value: Value) -> float:
    """Seconds of a field; ObjectError when it is no duration."""
    text = value.text()
    found = parse_duration_s(text)
    if found is None:
        raise value.error(f"{text!r} is not a duration like 5s or 1m30s")
    return found


def parse_duration_s(text: str) -> float | None:
    """Seconds of a text; None when it is no duration."""
    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return None
    return sum(float(number) * _UNITS_S[unit] for number, unit in parts)
