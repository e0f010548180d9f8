"""Mesh records and the garbage collector.

A record lives as long as the mesh does and is part of no cycle, yet each full
collection would walk all of them: two million objects for 200,000 workloads,
the better part of a second in which no byte moves. So records are frozen out
of the collector's sight, in portions small enough that collecting a portion
first (what else is garbage must not be frozen with it) goes unnoticed.

Freezing does not keep anything alive: a frozen record is freed like any other
when its last reference goes.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PORTION_RECORDS = 500
"""Collecting so many new records, with the shards that they sit in, takes 2 to 8 ms."""

_lock = threading.Lock()
_since = 0


def grown(records: int) -> None:
    """So many records were made since the last call; collects and freezes once it is a portion."""
    global _since  # the collector is one for the process, and so is its account
    with _lock:
        _since += records
        if _since < PORTION_RECORDS:
            return
        _since = 0
    settle()


def settle() -> None:
    """What lives now will live long: take it out of the collector's way."""
    gc.collect()
    gc.freeze()


@contextmanager
def undisturbed(records: int) -> Iterator[None]:
    """No collection while a structure for so many records is built; it is frozen then.

    Collecting comes before and not after: what is being built holds no
    garbage and would be most of what there is to walk. What little garbage
    other tasks make in the meantime is frozen with it.
    """
    if records < PORTION_RECORDS:
        yield
        grown(records)
        return
    gc.collect()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
