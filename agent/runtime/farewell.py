"""The orderly end of a tunnel: who says the last word, and who closes.

A socket that is closed while something unread is in it, or arrives later,
answers with a reset, and a reset eats what the kernel has not sent yet: the
last bytes of the last stream. So neither side just closes. The client says
goodbye when its last stream has ended, ends its direction, and waits for the
server to do so; the server waits for that. Either waits LINGER_S at most.
"""

from __future__ import annotations

import contextlib
import math
import socket
from collections.abc import Callable, Sized

import trio

LINGER_S = 2.0


class Farewell:
    """One tunnel's; its scope ends the tunnel when it is cancelled or its time is over."""

    def __init__(
        self,
        sock: socket.socket,
        backlog: Sized,
        scope: trio.CancelScope,
        goodbye: Callable[[], None],
    ) -> None:
        self._sock = sock
        self._backlog = backlog
        self._scope = scope
        self._goodbye = goodbye
        self.draining = False
        """The tunnel takes no more streams and ends with its last."""
        self.parting = False
        """Client: the last stream has ended; goodbye follows the backlog."""
        self.said = False
        """Nothing may be sent any more."""
        self.reason = "the tunnel was closed"

    def linger(self) -> None:
        """Server: all has ended, the client may close."""
        self._within("it was drained")

    def part(self, reason: str) -> None:
        """Client: all has ended."""
        self._within(reason)
        self.parting = True
        self.flushed()

    def flushed(self) -> None:
        """The backlog may be empty: now is the time for goodbye, if we part."""
        if self.parting and not self.said and not self._backlog:
            self._goodbye()
            self.said = True
            if not self._backlog:
                with contextlib.suppress(OSError):  # it broke: the reader will see
                    self._sock.shutdown(socket.SHUT_WR)

    def _within(self, reason: str) -> None:
        if self._scope.deadline == math.inf:
            self.reason = reason
            self._scope.deadline = trio.current_time() + LINGER_S
