"""A file descriptor that an object owns: open until it is closed, and closed once."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Self


class Descriptor:
    """Base of what stands for a BPF object. `called` names it in the error after the end."""

    __slots__ = ("_called", "_fd")

    def __init__(self, fd: int, called: str) -> None:
        self._fd = fd
        self._called = called

    def fileno(self) -> int:
        """The descriptor; ValueError once closed."""
        if self._fd < 0:
            raise ValueError(f"{self._called} is closed")
        return self._fd

    def close(self) -> None:
        """Give the descriptor back; harmless when repeated."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
