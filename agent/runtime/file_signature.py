"""Whether a file still has the content that was read from it.

What the file system promises: an atomic rename shows a new inode; a writer
that overwrites in place shows a size and an mtime that move while it writes,
and in between the content may be cut at a place where it still makes sense.
So a change is believed only once the signature has stood still for SETTLE_S,
and only if it is the same after the read as before.

Polling and not inotify: it works on every file system (overlay, NFS, a
mounted ConfigMap's symlink swap), and costs one stat() a poll.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import trio

SETTLE_S = 0.15

Look = TypeVar("Look")
Content = TypeVar("Content")


class Signature(NamedTuple):
    """Two equal ones are one content, as far as stat() can tell."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> Signature:
        """From what stat() said, which follows links: a projected volume swaps them."""
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def signature_of(path: Path) -> Signature | None:
    """Of the file as it is now; None when it cannot be looked at."""
    try:
        return Signature.of(os.stat(path))
    except OSError:
        return None


async def read_when_still(
    look: Callable[[], Look | None], seen: Look, read: Callable[[], Content]
) -> Content | None:
    """What `read` finds, or None when `look` does not give `seen` before it and after it.

    Both run in a thread, and what they raise comes out. None means that the
    place is being written: the next poll comes back to it.
    """
    await trio.sleep(SETTLE_S)
    if await trio.to_thread.run_sync(look) != seen:
        return None
    content = await trio.to_thread.run_sync(read)
    return content if await trio.to_thread.run_sync(look) == seen else None
