"""Makes tunnels: TLS handshakes on connected sockets, within a time limit."""

from __future__ import annotations

import socket

import trio
from OpenSSL import SSL

from meshbpf.agent.runtime.scratch import SCRATCH
from meshbpf.agent.wire.errors import TlsError
from meshbpf.agent.wire.tls import Expectation
from meshbpf.agent.wire.tls_channel import TlsChannel

HANDSHAKE_TIMEOUT_S = 10.0


async def shake_hands(
    sock: socket.socket, context: SSL.Context, expectation: Expectation, *, server: bool
) -> TlsChannel:
    """Do the TLS handshake; the peer is then whom `expectation` wants.

    Raises TlsError (the peer has been sent an alert) or OSError. The socket
    stays the caller's.
    """
    channel = TlsChannel(context, expectation, server=server)
    with trio.move_on_after(HANDSHAKE_TIMEOUT_S):
        while True:
            try:
                done = channel.handshake()
            except TlsError:
                # The alert: if the socket does not take it, the peer has
                # worse problems.
                _send_now(sock, channel.take())
                raise
            await _send_all(sock, channel.take())
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
