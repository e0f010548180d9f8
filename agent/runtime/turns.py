"""Which stream of a tunnel sends next: those that wait for the socket, and for a window."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meshbpf.agent.runtime.stream import TunnelStream


class Turns:
    """One tunnel's. `backlog` is what its socket did not take; while there is any, nobody sends."""

    def __init__(self, backlog: deque[memoryview]) -> None:
        self.waiting: dict[TunnelStream, None] = {}
        """Streams that wait for the socket, first come first served."""
        self._windowless: dict[TunnelStream, None] = {}
        self._backlog = backlog

    def wait(self, stream: TunnelStream) -> None:
        """Have the stream resumed when it may be able to send."""
        if self._backlog:
            self.waiting[stream] = None
        else:
            # The socket is free and this stream cannot use it.
            self.pass_on()
            self._windowless[stream] = None

    def pass_on(self) -> None:
        """Let the next stream send, if the socket is free.

        Whoever was woken owes a call of this, sent something or not: a turn
        that is kept strands all that wait behind it.
        """
        if self.waiting and not self._backlog:
            stream = next(iter(self.waiting))
            del self.waiting[stream]
            stream.resume()

    def window_opened(self, streams: Iterable[TunnelStream] | None) -> None:
        """A window of these has opened, or (None) the connection's."""
        for stream in list(self._windowless) if streams is None else streams:
            if stream in self._windowless:
                del self._windowless[stream]
                stream.resume()

    def forget(self, stream: TunnelStream) -> None:
        """The stream sends no more."""
        self.waiting.pop(stream, None)
        self._windowless.pop(stream, None)

    def clear(self) -> None:
        """Nobody sends any more."""
        self.waiting.clear()
        self._windowless.clear()
