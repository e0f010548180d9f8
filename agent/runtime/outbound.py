"""Connections that a pod's app opened: route them, tunnel or dial, relay.

Whatever goes wrong, the app sees a TCP reset: that is what a refused or
broken connection looks like to it, and no byte of ours could tell it more.
"""

from __future__ import annotations

import logging
import random
import secrets
import socket
from collections.abc import Callable, Sequence

import trio

from meshbpf.agent.core.address import IPAddress, SocketAddress
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.route import HboneRoute, PlainRoute, Refused, Route
from meshbpf.agent.core.routing import outbound
from meshbpf.agent.core.service import Service
from meshbpf.agent.core.traffic import Reporter, parse_baggage
from meshbpf.agent.core.workload import Workload
from meshbpf.agent.runtime.carrier import Carrier
from meshbpf.agent.runtime.connections import (
    ConnectionRegistry,
    Direction,
    LiveConnection,
    Transport,
)
from meshbpf.agent.runtime.doubt import wait_answer
from meshbpf.agent.runtime.handshake import shake_hands
from meshbpf.agent.runtime.hostnames import Resolve
from meshbpf.agent.runtime.identity_source import Identities
from meshbpf.agent.runtime.local_pod import LocalPod
from meshbpf.agent.runtime.mesh_view import MeshView, local_workload
from meshbpf.agent.runtime.nested import tunnel_within
from meshbpf.agent.runtime.pool import PoolKey
from meshbpf.agent.runtime.service_choices import NOBODY
from meshbpf.agent.runtime.sockets import (
    DialError,
    connect,
    family_of,
    hang_up,
    peer_address,
)
from meshbpf.agent.runtime.splice import splice_both
from meshbpf.agent.runtime.stream import TunnelStream
from meshbpf.agent.runtime.tasks import guarded
from meshbpf.agent.runtime.tunnel import Tunnel
from meshbpf.agent.wire import headers
from meshbpf.agent.wire.errors import WireError
from meshbpf.agent.wire.events import Headers, ResponseReceived
from meshbpf.agent.wire.tls import Expectation

log = logging.getLogger(__name__)

_IP_BIND_ADDRESS_NO_PORT = 24  # linux/in.h

EARLY_BYTES = 16 * 1024
"""Sent before the peer has said yes, if its windows let it pass."""
TunnelGone = Callable[[Tunnel], None]
"""What the pool wants called when a tunnel takes no more streams."""


class Outbound:
    """The outbound half of one pod."""

    def __init__(
        self,
        pod: LocalPod,
        mesh: MeshView,
        identities: Identities,
        connections: ConnectionRegistry,
        nursery: trio.Nursery,
        rng: random.Random,
        resolve: Resolve,
        carrier: Carrier | None = None,
    ) -> None:
        self._carrier = carrier
        self._pod = pod
        self._mesh = mesh
        self._identities = identities
        self._connections = connections
        self._nursery = nursery
        self._rng = rng
        self._resolve = resolve

    async def serve(self, app: socket.socket) -> None:
        """Carry one accepted connection to its end, and close it."""
        finished = False
        traffic = self._connections.telemetry.traffic
        traffic.socket_opened(Reporter.SOURCE)
        try:
            target = self._pod.original(app)
            source = peer_address(app)
            if target.ip.is_loopback:
                # Steering leaves loopback alone: somebody dialed our port.
                raise DialError("not-captured", f"{source} dialed the outbound listener itself")
            try:
                workload = await local_workload(self._pod, self._mesh)
                spared = NOBODY
                if self._carrier is not None:
                    spared = self._carrier.services.spared(self._pod, source, target)
                route = await self._route(workload, target, spared)
                if isinstance(route, Refused):
                    raise DialError(route.code, f"{source} to {target}: {route.reason}")
            except MeshbpfError as error:
                self._connections.telemetry.denied_early(Reporter.SOURCE, source, target, error)
                raise
            if self._carrier is not None and route.service is not None:
                self._carrier.offer_service(self._pod, source.ip, target)
            elif self._carrier is not None and isinstance(route, HboneRoute):
                self._carrier.offer_pair(self._pod, source.ip, target)
            transport = Transport.HBONE if isinstance(route, HboneRoute) else Transport.TCP
            with self._connections.track(
                self._pod, Direction.OUTBOUND, transport, source, target
            ) as live:
                live.source_workload = workload
                try:
                    with live.scope:
                        await self._carry(app, live, workload, route)
                except (MeshbpfError, OSError) as error:
                    live.fail(error)
                    raise
                finished = live.finished
        finally:
            hang_up(app, finished=finished)
            traffic.socket_closed(Reporter.SOURCE)

    async def _route(
        self, workload: Workload, target: SocketAddress, spared: frozenset[str]
    ) -> Route:
        """Decide; where a workload on the way has but a hostname, look that up and ask again."""
        names: dict[str, Sequence[IPAddress]] = {}
        while True:
            route = outbound(
                self._mesh(), workload, target, rng=self._rng, names=names, spared=spared
            )
            if not (isinstance(route, Refused) and route.unresolved):
                return route
            names[route.unresolved] = await self._resolve(route.unresolved)

    async def _carry(
        self,
        app: socket.socket,
        live: LiveConnection,
        workload: Workload,
        route: HboneRoute | PlainRoute,
    ) -> None:
        live.destination_workload = route.destination
        live.destination_service = route.service
        live.service = _service_name(route.service)
        live.target = route.target
        match route:
            case PlainRoute():
                self._connections.announce(live)
                await self._plain(app, live, route)
            case HboneRoute():
                live.tunnel_address = route.gateway
                live.source_identity = workload.identity
                if route.inner is None:  # else it turns out who is behind the gateway
                    self._connections.announce(live)
                await self._hbone(app, live, workload, route)

    async def _plain(self, app: socket.socket, live: LiveConnection, route: PlainRoute) -> None:
        upstream = await self._dial_tcp(live.source.ip, route.target)
        try:
            live.opened(route.target)
            await splice_both(app, upstream, live.sent, live.received)
            live.finished = True
        finally:
            hang_up(upstream, finished=live.finished)

    async def _hbone(
        self, app: socket.socket, live: LiveConnection, workload: Workload, route: HboneRoute
    ) -> None:
        # A second tunnel comes first in a stream that holds one.
        early = None if route.inner is not None else SaidAlready(app)
        stream = await self._ask(live, workload, route, early)
        live.sent.total += 0 if early is None else early.taken
        try:
            if route.inner is not None:
                stream = await self._ask_within(stream, live, workload, route, route.inner)
            stream.bind(live.scope, taken_from_app=live.sent, sent_to_app=live.received)
            live.destination_identity = stream.tunnel.peer
            live.opened(route.gateway)
            self._pod.streams.add(stream)
            await stream.relay(app)
            live.finished = True
        finally:
            self._pod.streams.discard(stream)
            if stream.failure:
                live.broke(stream.failure, stream.tunnel.fault)
            stream.abandon()

    async def _ask(
        self,
        live: LiveConnection,
        workload: Workload,
        route: HboneRoute,
        early: SaidAlready | None,
    ) -> TunnelStream:
        """A stream of a pooled tunnel that was answered 200.

        What the app has said already goes with the question: the answer to both then
        takes one round trip. It counts as sent only if the answer is yes.
        """
        request = self._request(live, workload, route)
        source = self._source_for(live.source.ip, route.gateway.ip)
        key = PoolKey(workload.identity, route.expected, route.gateway, source)

        async def dial(on_unusable: TunnelGone) -> Tunnel:
            return await self._dial_tunnel(key, on_unusable)

        async def trial() -> None:
            (await self._dial_tcp(key.source, key.gateway)).close()

        stream = await self._pod.pool.open(key, dial, request, early)
        try:
            answer = await wait_answer(stream, trial)
            if answer is None and not stream.tunnel.usable:
                # The tunnel had died unnoticed, most often because its pod went
                # and a new one has the address: what we sent brought the RST.
                # Nothing of the app's was taken that is not here still: ask on a new tunnel.
                stream.abandon()
                stream = await self._pod.pool.open(key, dial, request, early)
                answer = await wait_answer(stream, trial)
            _expect_200(answer, stream, str(route.gateway))
        except BaseException:
            if stream.response is None:  # else that says more than how the stream ended
                live.broke(stream.failure, stream.tunnel.fault)
            stream.abandon()
            raise
        return stream

    async def _ask_within(
        self,
        outer: TunnelStream,
        live: LiveConnection,
        workload: Workload,
        route: HboneRoute,
        allowed: frozenset[SpiffeId],
    ) -> TunnelStream:
        """The same of a tunnel of its own inside `outer`, to an endpoint behind the gateway."""
        tls = await self._identities.tls(workload.identity)
        tunnel = await tunnel_within(outer, tls.client, allowed, self._nursery)
        stream = tunnel.open(self._request(live, workload, route, workload.network))
        try:
            answer = await stream.wait_response()
            found = _expect_200(answer, stream, f"{route.authority} behind {route.gateway}")
        except BaseException:
            live.broke(stream.failure, stream.tunnel.fault)
            stream.abandon()
            raise
        live.destination_workload = None
        live.destination_described = parse_baggage(headers.text(found.headers, b"baggage"))
        live.destination_identity = stream.tunnel.peer
        self._connections.announce(live)
        return stream

    def _request(
        self,
        live: LiveConnection,
        workload: Workload,
        route: HboneRoute,
        network: str | None = None,
    ) -> Headers:
        return headers.connect_request(
            route.authority,
            headers.baggage(workload),
            live.source,
            route.service.hostname if route.service is not None else None,
            headers.traceparent(secrets.token_bytes(24))
            if live.trace is None
            else live.trace.header.encode(),
            network,
        )

    async def _dial_tunnel(self, key: PoolKey, on_unusable: TunnelGone) -> Tunnel:
        tls = await self._identities.tls(key.source_identity)
        try:
            sock = await self._dial_tcp(key.source, key.gateway)
        except DialError as error:
            if error.code != "connect-timeout":
                raise
            raise DialError(
                "gateway-timeout",
                f"{error.what}: is port {key.gateway.port} blocked by a NetworkPolicy?",
                "HBONE needs this port open between pods",
            ) from error
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
                tuning=self._pod.tuning,
            )
            tunnel.start()
        except BaseException:
            sock.close()
            raise
        self._nursery.start_soon(guarded, tunnel.run)
        return tunnel

    async def _dial_tcp(self, source: IPAddress, target: SocketAddress) -> socket.socket:
        family = family_of(target.ip)
        sock = self._pod.sockets.outbound(family)
        try:
            if source.version == target.ip.version:
                # The port is chosen at connect(), by the whole tuple.
                sock.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
                sock.bind((str(source), 0))
            await connect(sock, target)
        except BaseException:
            sock.close()
            raise
        return sock

    def _source_for(self, source: IPAddress, gateway: IPAddress) -> IPAddress:
        """The client's own address, or the pod's of the gateway's family."""
        if source.version == gateway.version:
            return source
        own = [each for each in self._pod.addresses if each.version == gateway.version]
        return min(own, key=int, default=source)


class SaidAlready:
    """What the app has sent by now, taken once and kept for a second try. An `Early`.

    Its end shows itself again to the relay; that it broke would not, and is raised.
    """

    def __init__(self, app: socket.socket) -> None:
        self._app = app
        self._data: bytes | None = None

    @property
    def taken(self) -> int:
        """Bytes that are no longer in the socket."""
        return len(self._data or b"")

    def __call__(self, room: int) -> bytes:
        """At most `room` bytes. DialError when more were taken before than there is room for."""
        if self._data is None:
            try:
                self._data = self._app.recv(min(room, EARLY_BYTES)) if room else b""
            except BlockingIOError:
                self._data = b""
        if len(self._data) > room:
            raise DialError(
                "tunnel-busy", f"a second tunnel has no room for {len(self._data)} bytes at once"
            )
        return self._data


def _expect_200(
    answer: ResponseReceived | None, stream: TunnelStream, whom: str
) -> ResponseReceived:
    if answer is None:
        raise WireError("stream-failed", f"{whom}: {stream.failure}")
    if answer.status != 200:
        raise WireError(f"status-{answer.status}", f"{whom} answered {answer.status}")
    return answer


def _service_name(service: Service | None) -> str:
    return "" if service is None else str(service.key)
