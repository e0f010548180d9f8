"""Connections into a pod: HBONE streams and plaintext, judged, dialed to the app, relayed.

An HBONE stream is answered 200 only once policy has let it in and the app has
accepted: the client's `connect()` then means what it says. Refusals are
statuses (400, 401, 503); plaintext can only be reset.
"""

from __future__ import annotations

import logging
import socket

import trio

from meshbpf.agent.core.address import IPAddress, SocketAddress
from meshbpf.agent.core.authz import ConnectionFacts
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.route import InboundRoute, Refused
from meshbpf.agent.core.routing import inbound_hbone, inbound_plain
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.traffic import Reporter, inbound_service, parse_baggage
from meshbpf.agent.core.workload import Workload
from meshbpf.agent.runtime.carrier import Carrier
from meshbpf.agent.runtime.connections import (
    ConnectionRegistry,
    Direction,
    LiveConnection,
    Transport,
    decide,
)
from meshbpf.agent.runtime.gate import Gate
from meshbpf.agent.runtime.handshake import HandshakePlaces, shake_hands
from meshbpf.agent.runtime.identity_source import Identities
from meshbpf.agent.runtime.local_pod import LocalPod
from meshbpf.agent.runtime.mesh_view import MeshView, local_workload
from meshbpf.agent.runtime.sockets import (
    DialError,
    connect,
    family_of,
    hang_up,
    local_address,
    peer_address,
)
from meshbpf.agent.runtime.splice import splice_both
from meshbpf.agent.runtime.stream import TunnelStream
from meshbpf.agent.runtime.tasks import guarded
from meshbpf.agent.runtime.telemetry import Telemetry
from meshbpf.agent.runtime.tunnel import Tunnel
from meshbpf.agent.wire import headers, proxy_v2
from meshbpf.agent.wire.events import RequestReceived
from meshbpf.agent.wire.tls import Expectation

log = logging.getLogger(__name__)

_HANDSHAKE_LIMIT = 2048
"""Handshakes of one pod at a time, for the memory of each (some 50 KiB in OpenSSL)."""


class DeniedError(MeshbpfError):
    """Policy does not let the connection in."""


class Inbound:
    """The inbound half of one pod."""

    def __init__(
        self,
        pod: LocalPod,
        mesh: MeshView,
        identities: Identities,
        connections: ConnectionRegistry,
        nursery: trio.Nursery,
        gate: Gate,
        carrier: Carrier | None = None,
    ) -> None:
        self._carrier = carrier
        self._pod = pod
        self._mesh = mesh
        self._identities = identities
        self._connections = connections
        self._nursery = nursery
        self._handshakes = HandshakePlaces(_HANDSHAKE_LIMIT)
        self._gate = gate
        self._tunnels: set[Tunnel] = set()

    def drain(self) -> None:
        """Have every tunnel that stands say GOAWAY and end with its last stream."""
        for tunnel in list(self._tunnels):
            tunnel.drain()

    # --- HBONE --------------------------------------------------------------

    async def serve_hbone(self, sock: socket.socket) -> None:
        """Serve one tunnel to its end, and close it."""
        telemetry = self._connections.telemetry
        telemetry.traffic.socket_opened(Reporter.DESTINATION)
        try:
            await self._serve_tunnel(sock, telemetry)
        finally:
            telemetry.traffic.socket_closed(Reporter.DESTINATION)

    async def _serve_tunnel(self, sock: socket.socket, telemetry: Telemetry) -> None:
        try:
            source = peer_address(sock)
            listener = local_address(sock)
            try:
                with self._handshakes.place() as place:
                    workload = await local_workload(self._pod, self._mesh)
                    tls = await self._identities.tls(workload.identity)
                    channel = await shake_hands(
                        sock,
                        tls.server,
                        Expectation(trust_domain=workload.identity.trust_domain),
                        server=True,
                        place=place,
                    )
            except MeshbpfError as error:
                telemetry.denied_early(Reporter.DESTINATION, source, listener, error)
                raise
        except BaseException:
            sock.close()
            raise

        def on_request(tunnel: Tunnel, request: RequestReceived, stream: TunnelStream) -> None:
            self._nursery.start_soon(
                guarded, self._serve_stream, tunnel, request, stream, source, listener
            )

        tunnel = Tunnel(
            sock,
            channel,
            self._nursery,
            server=True,
            on_request=on_request,
            tuning=self._pod.tuning,
        )
        tunnel.start()
        if not self._gate.is_open:
            tunnel.drain()  # accepted before the end began
        self._tunnels.add(tunnel)
        try:
            await tunnel.run()
        finally:
            self._tunnels.discard(tunnel)

    async def _serve_stream(
        self,
        tunnel: Tunnel,
        request: RequestReceived,
        stream: TunnelStream,
        source: SocketAddress,
        listener: SocketAddress,
    ) -> None:
        mesh = self._mesh()
        workload = self._pod.workload(mesh)
        route = self._route(request, workload, listener)
        if isinstance(route, Refused) or workload is None:
            status, reason, code = (
                (route.status, route.reason, route.code)
                if isinstance(route, Refused)
                else (503, f"{self._pod.key} is not in the mesh state", "unknown-workload")
            )
            told = f"{request.authority!r} refused with {status}: {reason}"
            self._connections.telemetry.denied_early(
                Reporter.DESTINATION, source, listener, DeniedError(code, told)
            )
            tunnel.respond(stream, headers.response(status), end_stream=True)
            return
        with self._connections.track(
            self._pod,
            Direction.INBOUND,
            Transport.HBONE,
            source,
            route.target,
            headers.text(request.headers, b"traceparent"),
        ) as live:
            live.source_identity = tunnel.peer
            live.destination_identity = workload.identity
            live.tunnel_address = listener
            live.source_described = parse_baggage(headers.text(request.headers, b"baggage"))
            host = headers.forwarded_host(request.headers)
            near = not headers.came_through_gateway(request.headers, workload.network)
            self._describe(live, mesh, workload, route, host, near=near)
            stream.bind(live.scope, taken_from_app=live.received, sent_to_app=live.sent)
            try:
                with live.scope:
                    await self._carry_stream(live, tunnel, stream, workload, route)
            finally:
                if stream.failure:
                    live.broke(stream.failure, tunnel.fault)
                stream.abandon()

    def _route(
        self, request: RequestReceived, workload: Workload | None, listener: SocketAddress
    ) -> InboundRoute | Refused:
        if not request.well_formed or request.method != b"CONNECT":
            return Refused("not a well-formed CONNECT", "bad-request", 400)
        if workload is None:
            return Refused(f"{self._pod.key} is not in the mesh state", "unknown-workload", 503)
        try:
            authority = request.authority.decode("ascii")
        except UnicodeDecodeError:
            return Refused("the authority is not ASCII", "bad-authority", 400)
        return inbound_hbone(
            self._mesh(), workload, self._pod.addresses, authority, arrived_at=listener.ip
        )

    async def _carry_stream(
        self,
        live: LiveConnection,
        tunnel: Tunnel,
        stream: TunnelStream,
        workload: Workload,
        route: InboundRoute,
    ) -> None:
        try:
            app = await self._admit(live, route)
        except DeniedError as error:
            live.fail(error)
            tunnel.respond(stream, headers.response(401), end_stream=True)
            return
        except (DialError, OSError) as error:
            live.fail(error)
            tunnel.respond(stream, headers.response(503), end_stream=True)
            return
        try:
            answer = headers.response(200, headers.baggage(workload))
            if not tunnel.respond(stream, answer, end_stream=False):
                return
            self._pod.streams.add(stream)
            await stream.relay(app)
            live.finished = True
        finally:
            self._pod.streams.discard(stream)
            stream.abandon()
            hang_up(app, finished=live.finished)

    # --- plaintext ----------------------------------------------------------

    async def serve_plain(self, client: socket.socket) -> None:
        """Carry one accepted plaintext connection to its end, and close it."""
        finished = False
        telemetry = self._connections.telemetry
        telemetry.traffic.socket_opened(Reporter.DESTINATION)
        try:
            source = peer_address(client)
            target = self._pod.original(client)
            if target.ip.is_loopback:
                raise DialError("not-captured", f"{source} dialed the inbound listener itself")
            try:
                workload = await local_workload(self._pod, self._mesh)
                mesh = self._mesh()
                route = inbound_plain(mesh, workload, target)
                if isinstance(route, Refused):
                    raise DialError(route.code, f"{source} to {target}: {route.reason}")
            except MeshbpfError as error:
                telemetry.denied_early(Reporter.DESTINATION, source, target, error)
                raise
            with self._connections.track(
                self._pod, Direction.INBOUND, Transport.TCP, source, target
            ) as live:
                caller = self._caller(source, target)
                attested = caller.workload(mesh) if caller is not None else None
                if attested is not None:
                    live.source_identity = attested.identity
                self._describe(live, mesh, workload, route, None)
                try:
                    with live.scope:
                        await self._carry_plain(client, live, route)
                except (MeshbpfError, OSError) as error:
                    live.fail(error)
                    raise
                finished = live.finished
        finally:
            hang_up(client, finished=finished)
            telemetry.traffic.socket_closed(Reporter.DESTINATION)

    async def _carry_plain(
        self, client: socket.socket, live: LiveConnection, route: InboundRoute
    ) -> None:
        app = await self._admit(live, route)
        self._offer(live, live.destination)
        try:
            await splice_both(client, app, live.sent, live.received)
            live.finished = True
        finally:
            hang_up(app, finished=live.finished)

    def _caller(self, source: SocketAddress, target: SocketAddress) -> LocalPod | None:
        """The pod of this node whose connection the kernel attests, and left to us."""
        if self._carrier is None:
            return None
        return self._carrier.caller(self._pod, source, target)

    def _offer(self, live: LiveConnection, target: SocketAddress) -> None:
        if self._carrier is None or live.facts is None:
            return
        caller = self._caller(live.source, target)
        if caller is not None:
            self._carrier.offer_pair(caller, live.source.ip, target)
        elif live.facts.source_identity is None:
            self._carrier.offer_plaintext(self._pod, live.facts)

    # --- both ---------------------------------------------------------------

    def _describe(
        self,
        live: LiveConnection,
        mesh: Snapshot,
        workload: Workload,
        route: InboundRoute,
        host: str | None,
        *,
        near: bool = True,
    ) -> None:
        """Note both ends. One that is not `near` has a gateway's address, which says nothing."""
        live.destination_workload = workload
        if near:
            live.source_workload = mesh.workload_at(workload.network, live.source.ip)
        live.service = "" if route.service is None else str(route.service.key)
        live.destination_service = inbound_service(
            mesh, workload, route.target.port, host, route.service
        )
        live.target = route.target
        self._connections.announce(live)

    async def _admit(self, live: LiveConnection, route: InboundRoute) -> socket.socket:
        """Ask policy, then dial the app from the client's address.

        Raises DeniedError, DialError or OSError.
        """
        target, dialed = route.target, route.dialed
        # From here on a new state rechecks this connection, so whichever of
        # the two comes last, the connection is judged by the newest state.
        live.facts = ConnectionFacts(
            source_identity=live.source_identity,
            source_ip=live.source.ip,
            destination_ip=target.ip,
            destination_port=target.port,
        )
        decision = decide(self._pod, live.facts, self._mesh())
        for line in decision.dry_run:
            log.info("dry run: %s to %s: %s", live.source, target, line)
        if not decision.allowed:
            self._connections.refused()
            raise DeniedError("policy-denied", f"{live.source} to {target}: {decision.reason}")
        client = self._client_for(live.source, dialed)
        app = self._pod.sockets.to_app(family_of(dialed.ip), client)
        try:
            await connect(app, dialed)
            if route.proxied is not None:
                # An empty socket's buffer has room for it; if not, the app is not usable.
                app.send(proxy_v2.header(live.source, route.proxied, live.source_identity))
        except BaseException:
            app.close()
            raise
        live.opened(dialed)
        return app

    def _client_for(self, source: SocketAddress, dialed: SocketAddress) -> IPAddress | None:
        """The address to dial the app from: the client's, unless it is the pod's own.

        Over loopback it is loopback's: the answer to any other would leave the pod.
        """
        if source.ip in self._pod.addresses or source.ip.version != dialed.ip.version:
            return None
        if dialed.ip.is_loopback:
            return None
        return source.ip
