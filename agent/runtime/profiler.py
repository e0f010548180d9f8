"""Where the agent spends its time and its memory, asked while it runs.

CPU: a thread looks at all threads' Python frames `frequency` times a second.
It needs the interpreter's lock for that and gets it when a running thread lets
go, so C code that holds the lock for long is charged to the line that called
it, and above 200 Hz the interpreter's 5 ms switch interval limits the rate;
real samples are what is counted. A thread that waits in the kernel is not on
the CPU: stacks whose innermost line is a known wait are left out unless
`waiting` is asked for. Cost: about 1 % of one core at 100 Hz.

Memory: tracemalloc, which sees allocations made after it was switched on and
slows allocation down to about half, so it is off until asked for.
"""

from __future__ import annotations

import re
import sys
import threading
import time
import tracemalloc
from collections import Counter
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Final

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.runtime import pprof
from meshbpf.agent.runtime.pprof import Frame, Kind, Stack

MAX_DEPTH: Final = 128
HEAP_FRAMES: Final = 16
"""How deep tracemalloc remembers each allocation; memory grows with it."""

# Innermost Python functions in which a thread sleeps: epoll of trio's loop,
# the log writer's queue, an idle worker, a sleeping heartbeat.
_WAITS: Final = frozenset(
    {
        "get_events",
        "wait",
        "_wait_for_tstate_lock",
        "acquire",
        "select",
        "poll",
        "sleep",
        "_work",
    }
)


class ProfileError(MeshbpfError):
    """A profile that cannot be taken now."""


@dataclass(frozen=True, slots=True)
class CpuProfile:
    """Stacks and how often each was seen."""

    samples: Counter[Stack]
    taken: int
    """How many times all threads were looked at."""
    began_ns: int
    """Unix time."""
    duration_ns: int
    period_ns: int

    def encoded(self) -> bytes:
        """As pprof."""
        return pprof.encode(
            (Kind("samples", "count"), Kind("cpu", "nanoseconds")),
            {stack: (count, count * self.period_ns) for stack, count in self.samples.items()},
            period=(Kind("cpu", "nanoseconds"), self.period_ns),
            time_ns=self.began_ns,
            duration_ns=self.duration_ns,
        )

    def collapsed(self) -> str:
        """As text for flamegraphs."""
        return pprof.collapsed({stack: (count,) for stack, count in self.samples.items()})


_ROOTS: Final = re.compile(r".*/(?=meshbpf/)|.*/site-packages/|.*/lib/python3\.\d+/")

_busy = threading.Lock()


def sample(
    seconds: float, frequency: int, stop: threading.Event, *, waiting: bool = False
) -> CpuProfile:
    """Take a CPU profile; blocks for `seconds` or until `stop` is set: call it in a thread.

    ProfileError (profile-busy) while another one is being taken.
    """
    if not _busy.acquire(blocking=False):
        raise ProfileError("profile-busy", "a CPU profile is being taken already")
    try:
        return _sample(seconds, frequency, stop, waiting)
    finally:
        _busy.release()


def _sample(seconds: float, frequency: int, stop: threading.Event, waiting: bool) -> CpuProfile:
    samples: Counter[Stack] = Counter()
    frames: dict[tuple[CodeType, int], Frame] = {}
    own = threading.get_ident()
    period_s = 1.0 / frequency
    began_ns, began = time.time_ns(), time.monotonic()
    taken = 0
    due = began
    while (now := time.monotonic()) < began + seconds:
        # What was missed is not made up for: a burst would sample one moment.
        due = max(due + period_s, now)
        if stop.wait(due - now):
            break
        taken += 1
        for thread, frame in sys._current_frames().items():
            if thread == own or (not waiting and frame.f_code.co_name in _WAITS):
                continue
            samples[_stack(frame, frames)] += 1
    return CpuProfile(
        samples=samples,
        taken=taken,
        began_ns=began_ns,
        duration_ns=int((time.monotonic() - began) * 1e9),
        period_ns=int(period_s * 1e9),
    )


def _stack(frame: FrameType | None, frames: dict[tuple[CodeType, int], Frame]) -> Stack:
    found: list[Frame] = []
    while frame is not None and len(found) < MAX_DEPTH:
        key = (frame.f_code, frame.f_lineno or frame.f_code.co_firstlineno)
        told = frames.get(key)
        if told is None:
            told = frames[key] = Frame(key[0].co_qualname, _file(key[0].co_filename), key[1])
        found.append(told)
        frame = frame.f_back
    return tuple(found)


# --- memory -------------------------------------------------------------------


def heap_active() -> bool:
    """Whether allocations are being recorded."""
    return tracemalloc.is_tracing()


def set_heap(active: bool) -> None:
    """Switch recording on or off; off forgets what was recorded."""
    if active and not tracemalloc.is_tracing():
        tracemalloc.start(HEAP_FRAMES)
    elif not active and tracemalloc.is_tracing():
        tracemalloc.stop()


def heap() -> bytes:
    """What is allocated now and was since recording began, as pprof; call it in a thread.

    ProfileError (heap-not-active) when nothing is recorded.
    """
    if not tracemalloc.is_tracing():
        raise ProfileError(
            "heap-not-active",
            "heap profiling is not active",
            "POST /debug/pprof/heap/profiling?activate=true",
        )
    snapshot = tracemalloc.take_snapshot()
    samples: dict[Stack, Counter[str]] = {}
    for trace in snapshot.traces:
        stack = tuple(
            Frame(f"{_file(one.filename)}:{one.lineno}", _file(one.filename), one.lineno)
            for one in reversed(trace.traceback)
        )
        found = samples.setdefault(stack, Counter())
        found["objects"] += 1
        found["bytes"] += trace.size
    return pprof.encode(
        (Kind("inuse_objects", "count"), Kind("inuse_space", "bytes")),
        {stack: (found["objects"], found["bytes"]) for stack, found in samples.items()},
        time_ns=time.time_ns(),
    )


def _file(path: str) -> str:
    """The path from the package on: `meshbpf/agent/...`, `trio/_core/...`."""
    found = _ROOTS.search(path)
    return path[found.end() :] if found else path
