"""What comes in: tunnels on 15008, CONNECTs in them, and the streams that those open.

A CONNECT is answered 200 as soon as its destination is one that this waypoint
serves: the endpoint is chosen for each request, and not yet known.
"""

from __future__ import annotations

import socket

import trio

from meshbpf.agent.core.address import SocketAddress
from meshbpf.agent.core.route import Refused
from meshbpf.agent.l7.admission import admit
from meshbpf.agent.l7.exchange import Caller, Connection, Destination, Protocol
from meshbpf.agent.l7.filter import Chain
from meshbpf.agent.l7.plan import UNDECLARED, PortPlan
from meshbpf.agent.l7.protocols import PREFACE, SNIFF_BYTES, sniff
from meshbpf.agent.runtime.handshake import shake_hands
from meshbpf.agent.runtime.identity_source import Identities
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.runtime.sockets import peer_address
from meshbpf.agent.runtime.stream import TunnelStream
from meshbpf.agent.runtime.tasks import guarded
from meshbpf.agent.runtime.tunnel import Tunnel
from meshbpf.agent.runtime.waypoint.channel import BrokenError, MemoryStream
from meshbpf.agent.runtime.waypoint.http1_server import Http1Request, Http1Server
from meshbpf.agent.runtime.waypoint.http2_server import Http2Request, Http2Server
from meshbpf.agent.runtime.waypoint.proxy import Proxy
from meshbpf.agent.runtime.waypoint.tcp import serve_tcp
from meshbpf.agent.wire import headers
from meshbpf.agent.wire.events import RequestReceived
from meshbpf.agent.wire.tls import Expectation

log = Log("waypoint")

_HANDSHAKE_LIMIT = 1024


class Served:
    """Totals since the start."""

    __slots__ = ("admitted", "refused", "tunnels")

    def __init__(self) -> None:
        self.tunnels = self.admitted = self.refused = 0


class Inbound:
    """The HBONE side of one waypoint process."""

    def __init__(self, proxy: Proxy, identities: Identities, nursery: trio.Nursery) -> None:
        self._proxy = proxy
        self._identities = identities
        self._nursery = nursery
        self._handshakes = trio.Semaphore(_HANDSHAKE_LIMIT)
        self.served = Served()

    async def serve_tunnel(self, sock: socket.socket) -> None:
        """Serve one tunnel to its end, and close it."""
        state = self._proxy.state
        try:
            source = peer_address(sock)
            identity = state.identity.identity
            async with self._handshakes:
                tls = await self._identities.tls(identity)
                channel = await shake_hands(
                    sock,
                    tls.server,
                    Expectation(trust_domain=identity.trust_domain),
                    server=True,
                )
        except BaseException:
            sock.close()
            raise
        self.served.tunnels += 1

        def on_request(tunnel: Tunnel, request: RequestReceived, stream: TunnelStream) -> None:
            assert isinstance(stream, MemoryStream)  # noqa: S101 (stream_type below)
            self._nursery.start_soon(guarded, self._serve_stream, tunnel, request, stream, source)

        tunnel = Tunnel(
            sock,
            channel,
            self._nursery,
            server=True,
            on_request=on_request,
            stream_type=MemoryStream,
        )
        tunnel.start()
        await tunnel.run()

    async def _serve_stream(
        self,
        tunnel: Tunnel,
        request: RequestReceived,
        stream: MemoryStream,
        source: SocketAddress,
    ) -> None:
        try:
            destination = self._admit(tunnel, request)
            if isinstance(destination, Refused):
                self.served.refused += 1
                log.info(
                    "CONNECT refused",
                    source=source,
                    peer=tunnel.peer,
                    authority=request.authority,
                    status=destination.status,
                    cause=destination.reason,
                )
                answer = headers.response(destination.status)
                tunnel.respond(stream, answer, end_stream=True)
                return
            self.served.admitted += 1
            state = self._proxy.state
            answer = headers.response(200, headers.baggage(state.own))
            if not tunnel.respond(stream, answer, end_stream=False):
                return
            workload = state.mesh.workload_at(state.own.network, source.ip)
            caller = Caller(tunnel.peer, source, workload)
            await self._serve(stream, caller, destination)
        except BrokenError:
            return  # the client has gone; nothing is left to say
        finally:
            stream.close()

    def _admit(self, tunnel: Tunnel, request: RequestReceived) -> Destination | Refused:
        state = self._proxy.state
        if not request.well_formed or request.method != b"CONNECT":
            return Refused("not a well-formed CONNECT", "bad-request", 400)
        try:
            authority = request.authority.decode("ascii")
        except UnicodeDecodeError:
            return Refused("the authority is not ASCII", "bad-authority", 400)
        return admit(state.mesh, state.plan, state.own, tunnel.peer, authority)

    async def _serve(self, stream: MemoryStream, caller: Caller, destination: Destination) -> None:
        chain, port = self._planned(destination)
        protocol, received = await self._protocol(stream, port.protocol)
        connection = Connection(caller, destination, protocol)
        proxy, limits = self._proxy, self._proxy.limits
        match protocol:
            case Protocol.HTTP1:

                async def one(request: Http1Request) -> None:
                    await proxy.handle(connection, request, Protocol.HTTP1)

                await Http1Server(stream, one, limits).run(received)
            case Protocol.HTTP2:

                async def each(request: Http2Request) -> None:
                    await proxy.handle(connection, request, Protocol.HTTP2)

                await Http2Server(stream, each, limits).run(received)
            case _:
                await serve_tcp(proxy, connection, chain, port, stream, received)

    def _planned(self, destination: Destination) -> tuple[Chain, PortPlan]:
        plan = self._proxy.state.plan
        if destination.service is None:
            return plan.pods, UNDECLARED
        found = plan.services[destination.service.key]  # `admit` has seen it there
        return found.chain, found.ports.get(destination.port, UNDECLARED)

    async def _protocol(
        self, stream: MemoryStream, declared: Protocol | None
    ) -> tuple[Protocol, bytes]:
        """What the stream speaks, and what has been received to find out.

        Of a port that is declared HTTP only the version is looked for: its
        client speaks first. Where nothing is declared the server may be the
        one that does, so a client's silence means that we must not wait.
        """
        if declared is Protocol.TCP:
            return declared, b""
        received = b""
        with trio.CancelScope() as scope:
            if declared is None:
                scope.deadline = trio.current_time() + self._proxy.limits.sniff_s
            while len(received) < SNIFF_BYTES:
                data = await stream.receive()
                received += data
                if declared is None:
                    found = sniff(received)
                    if found is not None:
                        return found, received
                elif not PREFACE.startswith(received[: len(PREFACE)]):
                    return Protocol.HTTP1, received
                elif len(received) >= len(PREFACE):
                    return Protocol.HTTP2, received
                if not data:
                    break
        if declared is not None:
            return Protocol.HTTP1, received
        return Protocol.TCP, received
