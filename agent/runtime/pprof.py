"""Profiles in pprof's format, which `go tool pprof` and its web page read.

A profile is one gzipped protobuf message (google/pprof, proto/profile.proto):
samples that refer to locations, locations to functions, and all names to one
table of strings. It is written here by hand: seven messages of integers need
no generated code, and this must not cost an import until somebody asks.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

CONTENT_TYPE: Final = "application/octet-stream"

# Field numbers of profile.proto.
_PROFILE_SAMPLE_TYPE: Final = 1
_PROFILE_SAMPLE: Final = 2
_PROFILE_LOCATION: Final = 4
_PROFILE_FUNCTION: Final = 5
_PROFILE_STRINGS: Final = 6
_PROFILE_TIME_NANOS: Final = 9
_PROFILE_DURATION_NANOS: Final = 10
_PROFILE_PERIOD_TYPE: Final = 11
_PROFILE_PERIOD: Final = 12


@dataclass(frozen=True, slots=True)
class Frame:
    """One line of one function."""

    function: str
    file: str
    line: int


Stack = tuple[Frame, ...]
"""Innermost frame first, as pprof wants it."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a value counts, and in which unit: ("cpu", "nanoseconds")."""

    name: str
    unit: str


def encode(
    kinds: Sequence[Kind],
    samples: Mapping[Stack, Sequence[int]],
    *,
    period: tuple[Kind, int] | None = None,
    time_ns: int = 0,
    duration_ns: int = 0,
) -> bytes:
    """A whole profile; each sample has a value for each of `kinds`."""
    strings: dict[str, int] = {"": 0}
    functions: dict[tuple[str, str], int] = {}
    locations: dict[Frame, int] = {}
    out = bytearray()

    def text(value: str) -> int:
        return strings.setdefault(value, len(strings))

    def kind(value: Kind) -> bytes:
        return _number(1, text(value.name)) + _number(2, text(value.unit))

    def location(frame: Frame) -> int:
        functions.setdefault((frame.function, frame.file), len(functions) + 1)
        return locations.setdefault(frame, len(locations) + 1)

    for one in kinds:
        out += _bytes(_PROFILE_SAMPLE_TYPE, kind(one))
    for stack, values in samples.items():
        out += _bytes(
            _PROFILE_SAMPLE, _packed(1, (location(frame) for frame in stack)) + _packed(2, values)
        )
    for frame, number in locations.items():
        line = _number(1, functions[frame.function, frame.file]) + _number(2, frame.line)
        out += _bytes(_PROFILE_LOCATION, _number(1, number) + _bytes(4, line))
    for (name, file), number in functions.items():
        told = _number(2, text(name)) + _number(3, text(name)) + _number(4, text(file))
        out += _bytes(_PROFILE_FUNCTION, _number(1, number) + told)
    if period is not None:
        out += _bytes(_PROFILE_PERIOD_TYPE, kind(period[0])) + _number(_PROFILE_PERIOD, period[1])
    out += _number(_PROFILE_TIME_NANOS, time_ns) + _number(_PROFILE_DURATION_NANOS, duration_ns)
    # Last: by now every name is in the table.
    for value in strings:
        out += _bytes(_PROFILE_STRINGS, value.encode("utf-8", "replace"))
    return gzip.compress(bytes(out), compresslevel=6, mtime=0)


def collapsed(samples: Mapping[Stack, Sequence[int]]) -> str:
    """One stack a line, outermost first, and its first value: what flamegraph tools read."""
    lines = [
        ";".join(f"{frame.function} ({frame.file}:{frame.line})" for frame in reversed(stack))
        + f" {values[0]}\n"
        for stack, values in samples.items()
    ]
    return "".join(sorted(lines))


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _packed(field: int, values: Iterable[int]) -> bytes:
    return _bytes(field, b"".join(map(_varint, values)))
