"""Times and sizes as people read them; machine output keeps the plain numbers."""

from __future__ import annotations

from datetime import datetime

_STEPS = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))
_PREFIXES = ("KiB", "MiB", "GiB", "TiB")


def duration(seconds: float) -> str:
    """Two units at most: `45s`, `3m12s`, `5h`, `12d3h`; under a second `<1s`."""
    whole = int(seconds)
    if whole < 1:
        return "0s" if seconds <= 0 else "<1s"
    parts: list[tuple[int, str]] = []
    for unit, size in _STEPS:
        count, whole = divmod(whole, size)
        if count or parts:
            parts.append((count, unit))
    return "".join(f"{count}{unit}" for count, unit in parts[:2] if count)


def size(number: int) -> str:
    """Bytes with a binary prefix and three digits at most: `0 B`, `1.50 KiB`, `12.3 MiB`."""
    if number < 1024:
        return f"{number} B"
    power = 1
    while power < len(_PREFIXES) and number / 1024**power >= 999.5:
        power += 1
    value, prefix = number / 1024**power, _PREFIXES[power - 1]
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {prefix}"


def count(number: int, noun: str, plural: str = "") -> str:
    """`1 policy`, `2 policies`: `plural` only where an s is not enough."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def moment(when: datetime | None) -> str:
    """UTC to the second, `2026-11-22 20:54:00Z`; empty for None."""
    return "" if when is None else f"{when:%Y-%m-%d %H:%M:%S}Z"


def until(when: datetime, now: datetime) -> str:
    """`in 5h` or `2m ago`."""
    seconds = (when - now).total_seconds()
    return f"in {duration(seconds)}" if seconds >= 0 else f"{duration(-seconds)} ago"
