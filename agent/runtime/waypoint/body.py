"""A body on its way: what has been read of it and is kept, and what is still to come."""

from __future__ import annotations

from collections.abc import Awaitable, Callable


class BodySource:
    """Reads a body once; what is gathered first is handed out first."""

    __slots__ = ("_read", "complete", "handed_out", "kept", "replaced", "size")

    def __init__(self, read: Callable[[], Awaitable[bytes]], *, has_body: bool) -> None:
        self._read = read
        self.complete = not has_body
        """All of it has been read."""
        self.kept = b""
        self.handed_out = False
        """Something has gone on that is not kept."""
        self.size = 0
        self.replaced = False
        """A filter has put another one in its place."""

    @property
    def replayable(self) -> bool:
        """The whole can be sent from the beginning."""
        return not self.handed_out

    async def gather(self, limit_bytes: int) -> None:
        """Read until the end, or until more than the limit is kept."""
        pieces = [self.kept]
        size = len(self.kept)
        while not self.complete and size <= limit_bytes:
            data = await self._read()
            if not data:
                self.complete = True
                break
            pieces.append(data)
            size += len(data)
        self.kept = b"".join(pieces)
        self.size = size

    def replace(self, data: bytes) -> None:
        """Send this instead. What was not read of the old one is left to its connection."""
        self.kept = data
        self.size = len(data)
        self.complete = self.replaced = True

    async def next(self) -> bytes:
        """Some of it that will not be kept; b"" at its end."""
        self.handed_out = True
        if self.kept:
            data, self.kept = self.kept, b""
            return data
        if self.complete:
            return b""
        data = await self._read()
        self.size += len(data)
        if not data:
            self.complete = True
        return data
