"""Makes tunnels: TLS handshakes on connected sockets, within a time limit.

Whoever connects and says nothing costs a place for as long as the limit. So
places go to those who speak: when there are none left, the oldest connection
whose hello has not come yet makes room, as in a SYN queue, and if there is
none such, the oldest of all. A client that means it says hello at once and is
through in milliseconds, however many others only sit there.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import trio
from OpenSSL import SSL

from meshbpf.agent.runtime.scratch import SCRATCH
from meshbpf.agent.wire.errors import TlsError
from meshbpf.agent.wire.tls import Expectation
from meshbpf.agent.wire.tls_channel import TlsChannel

HANDSHAKE_TIMEOUT_S = 10.0


class HandshakePlaces:
    """A bound on the accepted connections of one pod that are not tunnels yet."""

    def __init__(self, places: int) -> None:
        self._places = places
        # Both oldest first.
        self._silent: dict[trio.CancelScope, None] = {}
        self._answered: dict[trio.CancelScope, None] = {}
        self.taken = 0
        """Places that were taken, since the start."""
        self.evicted = 0
        """Connections that had to make room, since the start."""

    @contextmanager
    def place(self) -> Iterator[Place]:
        """Hold a place for the block. Raises TlsError when it was needed for others."""
        if len(self._silent) + len(self._answered) >= self._places:
            queue = self._silent or self._answered
            oldest = next(iter(queue))
            del queue[oldest]
            self.evicted += 1
            oldest.cancel()
        scope = trio.CancelScope()
        self._silent[scope] = None
        self.taken += 1
        try:
            with scope:
                yield Place(self, scope)
            if scope.cancelled_caught:
                raise TlsError("tls-evicted", "no TLS handshake yet, and others wanted the place")
        finally:
            self._silent.pop(scope, None)
            self._answered.pop(scope, None)

    def answered(self, scope: trio.CancelScope) -> None:
        """For `Place`."""
        if scope in self._silent:
            del self._silent[scope]
            self._answered[scope] = None


class Place:
    """One held place."""

    __slots__ = ("_places", "_scope")

    def __init__(self, places: HandshakePlaces, scope: trio.CancelScope) -> None:
        self._places = places
        self._scope = scope

    def answered(self) -> None:
        """The peer's hello has come, and has its answer."""
        self._places.answered(self._scope)


async def shake_hands(
    sock: socket.socket,
    context: SSL.Context,
    expectation: Expectation,
    *,
    server: bool,
    place: Place | None = None,
) -> TlsChannel:
    """Do the TLS handshake; the peer is then whom `expectation` wants.

    Raises TlsError (the peer has been sent an alert) or OSError. The socket
    stays the caller's.
    """
    with trio.move_on_after(HANDSHAKE_TIMEOUT_S):
        # A silent client costs a task and a descriptor, and no TLS state.
        hello = await _receive(sock) if server else None
        channel = TlsChannel(context, expectation, server=server)
        if hello is not None:
            channel.receive(hello)
        while True:
            try:
                done = channel.handshake()
            except TlsError:
                # The alert: if the socket does not take it, the peer has
                # worse problems.
                _send_now(sock, channel.take())
                raise
            answer = channel.take()
            if answer and place is not None:
                place.answered()
            await _send_all(sock, answer)
            if done:
                return channel
            channel.receive(await _receive(sock))
    raise TlsError("tls-timeout", f"no TLS handshake within {HANDSHAKE_TIMEOUT_S:.0f} s")


async def _receive(sock: socket.socket) -> memoryview:
    buffer = SCRATCH.ciphertext
    while True:
        await trio.lowlevel.wait_readable(sock)
        try:
            size = sock.recv_into(buffer)
        except BlockingIOError:
            continue
        if not size:
            raise TlsError("tls-handshake", "the peer closed the connection during the handshake")
        return buffer[:size]


async def _send_all(sock: socket.socket, data: bytes) -> None:
    left = memoryview(data)
    while left:
        try:
            left = left[sock.send(left) :]
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)


def _send_now(sock: socket.socket, data: bytes) -> None:
    try:
        sock.send(data)
    except OSError:
        return
