"""Whether new connections are taken.

One gate stands before all accept loops of an agent. Closing it touches no
listener: what is dialed meanwhile waits in the kernel's queues, for whoever
accepts next; a successor that has the same sockets, or this agent again.
"""

from __future__ import annotations

import socket

import trio


class Gate:
    """Opened and closed by the agent; its accept loops wait here."""

    def __init__(self, *, is_open: bool = True) -> None:
        self._opened = trio.Event()
        self._waiting: set[trio.CancelScope] = set()
        if is_open:
            self._opened.set()

    @property
    def is_open(self) -> bool:
        """Whether connections may be accepted now."""
        return self._opened.is_set()

    def open(self) -> None:
        """Take connections from now on."""
        self._opened.set()

    def close(self) -> None:
        """Take none that is not accepted yet."""
        if self.is_open:
            self._opened = trio.Event()
            for scope in self._waiting:
                scope.cancel()

    async def wait_readable(self, listener: socket.socket) -> None:
        """Return when the listener has something and it may be taken."""
        while True:
            await self._opened.wait()
            with trio.CancelScope() as scope:
                self._waiting.add(scope)
                try:
                    await trio.lowlevel.wait_readable(listener)
                finally:
                    self._waiting.discard(scope)
            if self.is_open and not scope.cancelled_caught:
                return
