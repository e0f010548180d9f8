"""Connections to another network's pods, and to apps that want a PROXY header.

The server pod is on network `far`. Its gateway is written here: it ends the
outer tunnel and passes the bytes of a stream on to the pod's HBONE port,
which is all that one does.
"""

from __future__ import annotations

import gc
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio

from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.local_xds import parse_local_xds
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.traffic import LABELS
from meshbpf.agent.core.tuning import ZTUNNELS
from meshbpf.agent.runtime.handshake import shake_hands
from meshbpf.agent.runtime.sockets import prepare
from meshbpf.agent.runtime.stream import TunnelStream
from meshbpf.agent.runtime.tunnel import Tunnel
from meshbpf.agent.wire import headers
from meshbpf.agent.wire.events import RequestReceived
from meshbpf.agent.wire.tls import Expectation
from tests.unit.forwarder.rig import (
    CLIENT,
    DB,
    PLAIN_SERVER,
    PORT,
    SERVER,
    WEB,
    Rig,
    expect_reset,
    listening,
    read_all,
)

pytestmark = [pytest.mark.root, pytest.mark.compat]

GATE = SpiffeId("cluster.local", "gates", "east-west")
GATE_PORT = 15010
TUNNEL_PORT = 15088


def far_mesh(san: SpiffeId = DB, more: str = "") -> Snapshot:
    """The server and its gateway are on network `far`; the client is on ours."""
    return Snapshot.of(
        parse_local_xds(
            f"""
workloads:
- {{uid: c, name: client, namespace: web, serviceAccount: client, workloadIps: [{CLIENT}],
    protocol: HBONE, services: {{}}}}
- uid: s
  name: server
  namespace: db
  serviceAccount: server
  workloadIps: [{SERVER}]
  network: far
  protocol: HBONE
  networkGateway: {{destination: far/{PLAIN_SERVER}, hboneMtlsPort: {GATE_PORT}}}
  services: {{db/hbone.db.svc: {{{PORT}: 9090}}}}
  {more}
- {{uid: g, name: gate, namespace: gates, serviceAccount: east-west, network: far,
    workloadIps: [{PLAIN_SERVER}], services: {{}}}}
services:
- name: hbone
  namespace: db
  hostname: hbone.db.svc
  vips: [/198.18.0.100]
  ports: {{{PORT}: 9090}}
  subjectAltNames: ["{san}"]
""",
            "far",
        )
    )


@dataclass
class Gateway:
    """What it was asked for."""

    requests: list[RequestReceived] = field(default_factory=list)
    tunnels: int = 0


@asynccontextmanager
async def gateway(rig: Rig) -> AsyncIterator[Gateway]:
    seen = Gateway()
    netns = rig.server.netns

    async def serve(sock: socket.socket) -> None:
        tls = await rig.identities.tls(GATE)
        channel = await shake_hands(
            sock, tls.server, Expectation(trust_domain="cluster.local"), server=True
        )
        seen.tunnels += 1
        tunnel = Tunnel(sock, channel, nursery, server=True, on_request=on_request)
        tunnel.start()
        await tunnel.run()

    def on_request(tunnel: Tunnel, request: RequestReceived, stream: TunnelStream) -> None:
        seen.requests.append(request)
        nursery.start_soon(forward, tunnel, stream)

    async def forward(tunnel: Tunnel, stream: TunnelStream) -> None:
        pod = netns.socket(socket.AF_INET, socket.SOCK_STREAM)
        with pod:
            pod.connect((SERVER, 15008))
            prepare(pod, ZTUNNELS.keepalive)
            tunnel.respond(stream, headers.response(200), end_stream=False)
            scope = trio.CancelScope()
            stream.bind(scope, stream.taken_from_app, stream.sent_to_app)
            try:
                with scope:
                    await stream.relay(pod)
            finally:
                stream.abandon()

    listener = listening(netns, PLAIN_SERVER, GATE_PORT)
    with listener:
        async with trio.open_nursery() as nursery:

            async def accept() -> None:
                while True:
                    await trio.lowlevel.wait_readable(listener)
                    sock, _ = listener.accept()
                    prepare(sock, ZTUNNELS.keepalive)
                    nursery.start_soon(serve, sock)

            nursery.start_soon(accept)
            yield seen
            nursery.cancel_scope.cancel()


async def test_a_pod_of_another_network_is_reached_through_its_gateway(rig: Rig) -> None:
    rig.state[0] = far_mesh()
    async with (
        gateway(rig) as gate,
        rig.listen(port=9090) as listener,
        rig.joined(listener) as (client, app),
    ):
        await client.send_all(b"over the sea")
        assert await app.receive_some(100) == b"over the sea"
        await app.send_all(b"and back")
        assert await client.receive_some(100) == b"and back"
        (there,) = rig.server.connections.list()
        assert there.source_identity == WEB
        assert str(there.destination) == f"{SERVER}:9090"
        (here,) = rig.client.connections.list()
        assert here.destination_identity == DB
        assert str(here.upstream) == f"{PLAIN_SERVER}:{GATE_PORT}"
        # What we know of the far side is what it has proven, and says of itself.
        (ours,) = rig.client.connections._live.values()
        told = dict(zip(LABELS, ours.labels(), strict=True))
        assert told["destination_workload_namespace"] == "db"
        assert told["destination_principal"] == str(DB)
        assert told["destination_service"] == "hbone.db.svc"
        # What the far side knows of the client is what it says of itself.
        (live,) = rig.server.connections._live.values()
        assert live.source_workload is None
        assert live.source_described is not None
        assert live.source_described.namespace == "web"
        assert live.destination_service is not None
        (request,) = gate.requests
        assert request.authority == b"hbone.db.svc:8080"
        assert headers.find(request.headers, headers.FORWARDED_NETWORK) is None


async def test_half_closes_and_megabytes_pass_both_tunnels(rig: Rig) -> None:
    rig.state[0] = far_mesh()
    sent = bytes(range(256)) * 16384
    async with (
        gateway(rig),
        rig.listen(port=9090) as listener,
        rig.joined(listener) as (client, app),
        trio.open_nursery() as nursery,
    ):

        async def send() -> None:
            await client.send_all(sent)
            await client.send_eof()

        nursery.start_soon(send)
        with trio.fail_after(20):
            assert await read_all(app) == sent
            await app.send_all(b"got it")
            await app.send_eof()
            assert await read_all(client) == b"got it"


async def test_outer_tunnels_are_shared_and_inner_ones_are_not(rig: Rig) -> None:
    rig.state[0] = far_mesh()
    async with (
        gateway(rig) as gate,
        rig.listen(port=9090) as listener,
        rig.joined(listener),
        rig.joined(listener),
    ):
        assert gate.tunnels == 1
        assert len(gate.requests) == 2
        assert rig.client.pod.pool.statistics().tunnels == 1
        # Both ends of the outer one, and of an inner one for each connection.
        live = [o for o in gc.get_objects() if isinstance(o, Tunnel) and not o.closed]
        assert len(live) == 2 + 2 * 2


async def test_an_endpoint_that_is_not_the_services_gets_no_byte(rig: Rig) -> None:
    rig.state[0] = far_mesh(san=SpiffeId("cluster.local", "db", "another"))
    async with gateway(rig) as gate, rig.listen(port=9090) as listener, await rig.dial() as client:
        await client.send_all(b"secret")
        await expect_reset(client)
        assert len(gate.requests) == 1
        with trio.move_on_after(0.1):
            await listener.accept()
            pytest.fail("the app was reached")


async def test_a_refusal_at_the_far_end_reaches_the_client(rig: Rig) -> None:
    rig.state[0] = far_mesh()
    async with gateway(rig), await rig.dial() as client:  # nobody listens at 9090
        await expect_reset(client)
        assert rig.client.connections.list() == []


async def test_nothing_stays_behind_of_nested_tunnels(rig: Rig) -> None:
    rig.state[0] = far_mesh()
    async with gateway(rig), rig.listen(port=9090) as listener:
        for _ in range(3):
            async with rig.joined(listener) as (client, app):
                await client.send_eof()
                assert await app.receive_some(10) == b""
                await app.send_eof()
                assert await client.receive_some(10) == b""
        before = trio.lowlevel.current_statistics().tasks_living
        for _ in range(10):
            async with rig.joined(listener) as (client, app):
                await client.send_eof()
                await app.receive_some(10)
                await app.send_eof()
                await client.receive_some(10)
        with trio.fail_after(5):
            while trio.lowlevel.current_statistics().tasks_living > before:  # noqa: ASYNC110
                await trio.sleep(0.02)


async def test_an_app_with_a_tunnel_gets_the_clients_address_and_identity_first(rig: Rig) -> None:
    text = f"applicationTunnel: {{protocol: PROXY, port: {TUNNEL_PORT}}}"
    rig.state[0] = Snapshot.of(parse_local_xds(_near(text), "near"))
    async with (
        rig.listen(port=TUNNEL_PORT, ip="127.0.0.1") as listener,
        rig.joined(listener) as (client, app),
    ):
        await client.send_all(b"hello")
        data = b""
        with trio.fail_after(5):
            while not data.endswith(b"hello"):
                data += await app.receive_some(1000)
        assert data.startswith(b"\r\n\r\n\0\r\nQUIT\n\x21\x11")
        assert data[16:24] == socket.inet_aton(CLIENT) + socket.inet_aton(SERVER)
        assert int.from_bytes(data[26:28], "big") == PORT
        assert data[28:].startswith(b"\xd0")
        assert str(WEB).encode() in data
        assert app.socket.getpeername()[0] == "127.0.0.1"
        (there,) = rig.server.connections.list()
        assert str(there.upstream) == f"127.0.0.1:{TUNNEL_PORT}"


async def test_policy_judges_the_tunnels_port(rig: Rig) -> None:
    text = f"applicationTunnel: {{protocol: PROXY, port: {TUNNEL_PORT}}}"
    deny = f"""
- {{name: p, namespace: db, scope: Namespace, action: Deny,
   rules: [[[{{destinationPorts: [{TUNNEL_PORT}]}}]]]}}
"""
    rig.state[0] = Snapshot.of(parse_local_xds(_near(text, deny), "near"))
    async with (
        rig.listen(port=TUNNEL_PORT, ip="127.0.0.1"),
        await rig.dial() as client,
    ):
        await expect_reset(client)


def _near(more: str, policies: str = "[]") -> str:
    return f"""
workloads:
- {{uid: c, name: client, namespace: web, serviceAccount: client, workloadIps: [{CLIENT}],
    protocol: HBONE, services: {{}}}}
- uid: s
  name: server
  namespace: db
  serviceAccount: server
  workloadIps: [{SERVER}]
  protocol: HBONE
  services: {{db/hbone.db.svc: {{{PORT}: {PORT}}}}}
  {more}
services:
- {{name: hbone, namespace: db, hostname: hbone.db.svc, vips: [/198.18.0.100],
    ports: {{{PORT}: {PORT}}}}}
policies: {policies}
"""
