"""Connections from the waypoint to endpoints: streams of tunnels, or plain TCP.

Towards a captured endpoint the waypoint shows its own identity: the node
proxy there sees the waypoint as the caller, as with Istio.
"""

from __future__ import annotations

import secrets
import socket

import trio

from meshbpf.agent.core.address import IPAddress, SocketAddress
from meshbpf.agent.core.route import HboneRoute, PlainRoute
from meshbpf.agent.core.tuning import ZTUNNELS
from meshbpf.agent.core.workload import Workload
from meshbpf.agent.runtime.handshake import shake_hands
from meshbpf.agent.runtime.identity_source import Identities
from meshbpf.agent.runtime.outbound import TunnelGone
from meshbpf.agent.runtime.pool import PoolKey, TunnelPool
from meshbpf.agent.runtime.sockets import DialError, connect, family_of, prepare
from meshbpf.agent.runtime.tasks import guarded
from meshbpf.agent.runtime.tunnel import Tunnel
from meshbpf.agent.runtime.waypoint.channel import Channel, MemoryStream, SocketChannel
from meshbpf.agent.wire import headers
from meshbpf.agent.wire.tls import Expectation


class Dialer:
    """Opens connections under one identity."""

    def __init__(self, identities: Identities, nursery: trio.Nursery) -> None:
        self._identities = identities
        self._nursery = nursery
        self.tunnels = TunnelPool()

    async def open(self, own: Workload, route: HboneRoute | PlainRoute) -> Channel:
        """A new connection to where `route` leads. Raises MeshbpfError or OSError."""
        if isinstance(route, PlainRoute):
            return SocketChannel(await _dial_tcp(route.target))
        return await self._through_tunnel(own, route)

    async def _through_tunnel(self, own: Workload, route: HboneRoute) -> MemoryStream:
        source = _address(own, route.gateway)
        request = headers.connect_request(
            route.authority,
            headers.baggage(own),
            SocketAddress(source, 0),
            None if route.service is None else route.service.hostname,
            headers.traceparent(secrets.token_bytes(24)),
        )
        key = PoolKey(own.identity, route.expected, route.gateway, source)

        async def dial(on_unusable: TunnelGone) -> Tunnel:
            return await self._dial_tunnel(key, on_unusable)

        for again in (True, False):
            stream = await self.tunnels.open(key, dial, request)
            assert isinstance(stream, MemoryStream)  # noqa: S101 (what _dial_tunnel makes)
            try:
                answer = await stream.wait_response()
            except BaseException:
                stream.close()
                raise
            if answer is not None and answer.status == 200:
                return stream
            stream.close()
            if answer is not None:
                raise DialError(
                    f"status-{answer.status}",
                    f"{route.gateway} answered {answer.status} to a CONNECT for {route.authority}",
                )
            if again and not stream.tunnel.usable:
                continue  # the tunnel had died unnoticed; nothing has been sent on it
            break
        raise DialError("stream-failed", f"{route.gateway}: {stream.failure}")

    async def _dial_tunnel(self, key: PoolKey, on_unusable: TunnelGone) -> Tunnel:
        tls = await self._identities.tls(key.source_identity)
        sock = await _dial_tcp(key.gateway)
        try:
            channel = await shake_hands(
                sock, tls.client, Expectation(allowed=key.allowed), server=False
            )
            tunnel = Tunnel(
                sock,
                channel,
                self._nursery,
                server=False,
                on_unusable=on_unusable,
                stream_type=MemoryStream,
            )
            tunnel.start()
        except BaseException:
            sock.close()
            raise
        self._nursery.start_soon(guarded, tunnel.run)
        return tunnel


async def _dial_tcp(target: SocketAddress) -> socket.socket:
    sock = socket.socket(family_of(target.ip), socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        prepare(sock, ZTUNNELS.keepalive)
        await connect(sock, target)
    except BaseException:
        sock.close()
        raise
    return sock


def _address(own: Workload, gateway: SocketAddress) -> IPAddress:
    """Our address of the gateway's family: what the other side will see."""
    same = [ip for ip in own.addresses if ip.version == gateway.ip.version]
    return (same or own.addresses or (gateway.ip,))[0]
