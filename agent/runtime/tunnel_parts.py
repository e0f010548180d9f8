"""What others see of a tunnel: its figures, its inside, its streams' last words."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from h2.errors import ErrorCodes

from meshbpf.agent.runtime import native
from meshbpf.agent.wire.hbone import HboneConnection

if TYPE_CHECKING:
    from meshbpf.agent.runtime.stream import TunnelStream


@dataclass(frozen=True, slots=True)
class TunnelStatistics:
    """A tunnel at one moment."""

    streams: int
    backlog_bytes: int
    pooled: bool
    going_away: bool


@dataclass(frozen=True, slots=True)
class TunnelParts:
    """A tunnel's inside, for native.py alone: the C code works on the same objects."""

    tls: tuple[int, int, int] | None
    wire: HboneConnection
    turn: dict[TunnelStream, None]
    backlog: deque[memoryview]
    fast: dict[int, native.Handle]


def reset_reason(error_code: int, by_peer: bool) -> str:
    """Why a stream has gone, in words."""
    try:
        name = ErrorCodes(error_code).name
    except ValueError:
        name = str(error_code)
    return f"the {'peer' if by_peer else 'agent'} reset the stream ({name})"
