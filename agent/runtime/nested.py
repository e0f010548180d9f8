"""A tunnel inside a stream of another one: how a pod reaches another network.

The outer tunnel leads to the other network's gateway, which passes on the
bytes of a stream to an endpoint of its choice. In those bytes we speak TLS
and HTTP/2 once more, with that endpoint ("double HBONE"). So the gateway
reads nothing, and the identity that the endpoint sees is the pod's own.

The inner tunnel stands on one end of a socket pair, and the outer stream
relays the other end as if it were an app's connection. Both tunnels are then
what they always are. It costs two copies within the kernel for each byte that
crosses networks, where the way between them is what limits.

Inner tunnels are never shared: the gateway's choice is for one stream.
"""

from __future__ import annotations

import socket

import trio
from OpenSSL import SSL

from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.runtime.handshake import shake_hands
from meshbpf.agent.runtime.stream import ByteCount, TunnelStream
from meshbpf.agent.runtime.tasks import guarded
from meshbpf.agent.runtime.tunnel import Tunnel
from meshbpf.agent.wire.tls import Expectation

FAREWELL_S = 1.0
"""How long the gateway may take to end its half once the inner tunnel is over."""


async def tunnel_within(
    outer: TunnelStream,
    context: SSL.Context,
    allowed: frozenset[SpiffeId],
    nursery: trio.Nursery,
) -> Tunnel:
    """A tunnel through `outer` to who proves one of `allowed`; it ends with its first stream.

    From here on `outer` belongs to it. Raises TlsError or OSError; then
    `outer` has been given up.
    """
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
    scope = trio.CancelScope()
    nursery.start_soon(guarded, _carry, outer, theirs, scope)
    try:
        channel = await shake_hands(ours, context, Expectation(allowed=allowed), server=False)
        tunnel = Tunnel(ours, channel, nursery, server=False)
        tunnel.start()
    except BaseException:
        ours.close()
        scope.cancel()
        raise
    nursery.start_soon(guarded, _run, tunnel, scope)
    return tunnel


async def _carry(outer: TunnelStream, sock: socket.socket, scope: trio.CancelScope) -> None:
    outer.bind(scope, taken_from_app=ByteCount(), sent_to_app=ByteCount())
    try:
        with scope:
            await outer.relay(sock)
    finally:
        outer.abandon()
        sock.close()


async def _run(tunnel: Tunnel, scope: trio.CancelScope) -> None:
    try:
        await tunnel.run()
    finally:
        scope.deadline = trio.current_time() + FAREWELL_S
