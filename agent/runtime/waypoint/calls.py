"""Calls that filters ask for: to services of the mesh, or to hosts outside."""

from __future__ import annotations

import ssl
from collections.abc import Callable

import trio

from meshbpf.agent.core.address import SocketAddress, parse_ip
from meshbpf.agent.core.authority import HostPort
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.route import PlainRoute, Refused
from meshbpf.agent.l7.authn.uris import refused_address
from meshbpf.agent.l7.balancer import Balancer
from meshbpf.agent.l7.filter import Call, CallAnswer, CallFailed
from meshbpf.agent.l7.message import ResponseHead
from meshbpf.agent.runtime.waypoint.channel import BrokenError, Channel
from meshbpf.agent.runtime.waypoint.dial import Dialer
from meshbpf.agent.runtime.waypoint.http1_client import Http1Connection
from meshbpf.agent.runtime.waypoint.http2_client import Http2Client
from meshbpf.agent.runtime.waypoint.limits import Limits
from meshbpf.agent.runtime.waypoint.message import UpstreamRequest
from meshbpf.agent.runtime.waypoint.pools import Pools
from meshbpf.agent.runtime.waypoint.state import LiveState

_READ_BYTES = 64 * 1024


class Calls:
    """Makes them."""

    def __init__(
        self,
        state: LiveState,
        pools: Pools,
        dialer: Dialer,
        balancer: Balancer,
        nursery: trio.Nursery,
        limits: Limits,
        clock: Callable[[], float],
    ) -> None:
        self._state = state
        self._pools = pools
        self._dialer = dialer
        self._balancer = balancer
        self._nursery = nursery
        self._limits = limits
        self._clock = clock
        self._tls = ssl.create_default_context()

    async def __call__(self, call: Call) -> CallAnswer | CallFailed:
        """The answer, or why there is none."""
        with trio.move_on_after(call.timeout_s):
            try:
                return await self._ask(call)
            except (MeshbpfError, OSError) as error:
                return CallFailed(f"{call.target}: {error}")
        return CallFailed(f"{call.target}: no answer within {call.timeout_s:g} s")

    async def _ask(self, call: Call) -> CallAnswer | CallFailed:
        upstream = await self._connect(call)
        try:
            has_body = bool(call.body)
            head = call.head.copy()
            if has_body:
                head.headers.set("content-length", str(len(call.body)))
            await upstream.send_head(head, has_body=has_body, upgrade="")
            if has_body:
                await upstream.send_body(call.body)
                await upstream.end_body(None)
            answer = await upstream.read_head()
            body = b""
            while data := await upstream.read_body():
                body += data
                if len(body) > call.limit_bytes:
                    return CallFailed(f"the answer is longer than {call.limit_bytes} bytes")
            return CallAnswer(_with_trailers(answer, upstream), body)
        finally:
            upstream.release()

    async def _connect(self, call: Call) -> UpstreamRequest:
        state, target = self._state, call.target
        own, mesh = state.own, state.mesh
        service = (
            mesh.service_with_hostname(target.host, own.namespace)
            if isinstance(target, HostPort)
            else mesh.service_at(own.network, target.ip, own.namespace)
        )
        if service is not None and not call.tls:
            choice = self._balancer.pick(mesh, own, service, target.port, self._clock())
            if isinstance(choice, Refused):
                raise MeshbpfError(choice.code, choice.reason)
            return await self._pools.acquire(own, choice, http2=call.http2)
        channel = await self._outside(call)
        if not call.http2:
            return Http1Connection(channel, self._limits)
        client = Http2Client(channel, self._limits, self._nursery)
        await client.start()
        upstream = client.open()
        client.drain()  # it ends with this request
        return upstream

    async def _outside(self, call: Call) -> Channel:
        target = call.target
        if isinstance(target, SocketAddress) and not call.tls:
            return await self._dialer.open(self._state.own, PlainRoute(target, None, None))
        host = target.host if isinstance(target, HostPort) else str(target.ip)
        address = await _guarded_address(host, target.port) if call.guarded else host
        stream = await trio.open_tcp_stream(address, target.port)
        if not call.tls:
            return StreamChannel(stream)
        secured = trio.SSLStream(stream, self._tls, server_hostname=host)
        try:
            await secured.do_handshake()
        except trio.BrokenResourceError as error:
            await trio.aclose_forcefully(secured)
            raise BrokenError(f"TLS with {host}: {error.__cause__ or error}") from error
        return StreamChannel(secured)


async def _guarded_address(host: str, port: int) -> str:
    """The address to dial for a host that an object's author chose, resolved once.

    All addresses must be allowed: which of several is dialed is no one's choice.
    """
    found = await trio.socket.getaddrinfo(host, port, type=trio.socket.SOCK_STREAM)
    addresses = [str(sockaddr[0]) for *_, sockaddr in found]
    for address in addresses:
        if reason := refused_address(parse_ip(address)):
            raise MeshbpfError("address-refused", f"{host}: {address} {reason}")
    return addresses[0]


class StreamChannel:
    """A trio stream. A `Channel`."""

    def __init__(self, stream: trio.SocketStream | trio.SSLStream[trio.SocketStream]) -> None:
        self._stream = stream

    async def receive(self) -> bytes:
        """See Channel."""
        try:
            return bytes(await self._stream.receive_some(_READ_BYTES))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise BrokenError(str(error.__cause__ or error)) from error

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        """See Channel."""
        try:
            await self._stream.send_all(bytes(data))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise BrokenError(str(error.__cause__ or error)) from error

    async def send_eof(self) -> None:
        """See Channel. TLS has no half-close that would be worth its name."""

    def close(self) -> None:
        """See Channel."""
        inner = self._stream
        socket_stream = inner if isinstance(inner, trio.SocketStream) else inner.transport_stream
        socket_stream.socket.close()

    def watch_end(self, callback: Callable[[], None] | None) -> None:
        """See Channel. These are not kept, so nobody has to watch them."""

    def watch_broken(self, callback: Callable[[], None] | None) -> None:
        """See Channel. Likewise."""


def _with_trailers(head: ResponseHead, upstream: UpstreamRequest) -> ResponseHead:
    head.trailers = upstream.trailers
    return head
