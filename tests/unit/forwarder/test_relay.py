"""Bytes through two real forwarders: HBONE and plain, both ways, to every kind of end."""

from __future__ import annotations

import gc
import hashlib
import os

import pytest
import trio

from meshbpf.agent.runtime.stream import TunnelStream
from tests.unit.forwarder.rig import (
    CLIENT,
    HBONE_VIP,
    HBONE_VIP_6,
    PLAIN_SERVER,
    PLAIN_VIP,
    SERVER,
    SERVER_6,
    Rig,
    expect_reset,
    listening,
    read_all,
    reset,
)

pytestmark = pytest.mark.root

MIB = 1024 * 1024


@pytest.fixture(
    params=[
        ("hbone", HBONE_VIP, SERVER),
        ("hbone6", HBONE_VIP_6, SERVER_6),
        ("plain-out", PLAIN_VIP, PLAIN_SERVER),
        ("plain-in", SERVER, SERVER),
    ],
    ids=lambda param: param[0],
)
async def pair(rig: Rig, request: pytest.FixtureRequest):
    """A client's stream and the app's, joined by the forwarders in one of the four ways."""
    _kind, dialed, app_ip = request.param
    port = 9000 if dialed == SERVER else 8080
    listener = trio.SocketListener(
        trio.socket.from_stdlib_socket(
            # Beside the inbound listener on v0 there is room only on lo.
            listening(rig.server.netns, app_ip, port, device=b"lo" if port == 9000 else b"")
        )
    )
    async with listener, await rig.dial(dialed, port) as client:
        with trio.fail_after(5):
            app = await listener.accept()
        async with app:
            yield client, app


async def test_bytes_pass_unchanged_in_both_directions_at_once(pair) -> None:
    client, app = pair
    up, down = os.urandom(3 * MIB), os.urandom(5 * MIB)
    seen: dict[str, bytes] = {}

    async def send(stream: trio.SocketStream, data: bytes) -> None:
        await stream.send_all(data)
        await stream.send_eof()

    async def receive(name: str, stream: trio.SocketStream) -> None:
        seen[name] = hashlib.sha256(await read_all(stream)).digest()

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, client, up)
            nursery.start_soon(send, app, down)
            nursery.start_soon(receive, "up", app)
            nursery.start_soon(receive, "down", client)
    assert seen == {"up": hashlib.sha256(up).digest(), "down": hashlib.sha256(down).digest()}


@pytest.mark.compat
async def test_the_client_may_end_first_and_still_listen(pair) -> None:
    client, app = pair
    with trio.fail_after(5):
        await client.send_all(b"question")
        await client.send_eof()
        assert await read_all(app) == b"question"
        await app.send_all(b"answer")
        await app.send_eof()
        assert await read_all(client) == b"answer"


@pytest.mark.compat
async def test_the_app_may_end_first_and_still_listen(pair) -> None:
    client, app = pair
    with trio.fail_after(5):
        await app.send_all(b"greeting")
        await app.send_eof()
        assert await read_all(client) == b"greeting"
        await client.send_all(b"thanks")
        await client.send_eof()
        assert await read_all(app) == b"thanks"


async def test_a_server_may_speak_first(pair) -> None:
    client, app = pair
    with trio.fail_after(5):
        await app.send_all(b"220 ready")
        assert await client.receive_some(100) == b"220 ready"


async def test_a_clients_reset_reaches_the_app(pair) -> None:
    client, app = pair
    await client.send_all(b"x")
    assert await app.receive_some(1) == b"x"
    reset(client)
    await expect_reset(app)


async def test_an_apps_reset_reaches_the_client(pair) -> None:
    client, app = pair
    await app.send_all(b"x")
    assert await client.receive_some(1) == b"x"
    reset(app)
    await expect_reset(client)


async def test_an_end_with_bytes_still_unread_loses_none(pair) -> None:
    client, app = pair
    data = os.urandom(2 * MIB)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(app.send_all, data)
            await trio.sleep(0.2)  # far more than the app's socket holds is on its way
            received = bytearray()
            while len(received) < len(data):
                received += await client.receive_some(65536)
            assert received == data
        await app.send_eof()
        await client.send_eof()
        assert await read_all(client) == b""


@pytest.mark.compat
async def test_a_refused_dial_is_a_reset_for_the_client(rig: Rig) -> None:
    async with await rig.dial(HBONE_VIP) as client:  # no app listens
        await expect_reset(client)
    async with await rig.dial(PLAIN_VIP) as client:
        await expect_reset(client)


async def test_a_reader_that_stops_holds_the_sender_and_no_memory(rig: Rig) -> None:
    async with rig.joined() as (client, app):
        sent = 0
        with trio.move_on_after(2):
            while sent < 200 * MIB:
                await client.send_all(bytes(MIB))
                sent += MIB
        (stream,) = streams_with_app()
        assert 0 < len(stream.pending) <= 4 * MIB
        assert sent < 100 * MIB
        stopped = stream.sent_to_app.total
        await trio.sleep(0.2)
        assert stream.sent_to_app.total == stopped
        # And it goes on as soon as the reader does.
        got = 0
        with trio.fail_after(10):
            while got < sent:
                got += len(await app.receive_some(MIB))


@pytest.mark.compat
async def test_a_slow_stream_does_not_stop_others_of_its_tunnel(rig: Rig) -> None:
    async with rig.listen() as listener, rig.joined(listener) as (slow_client, slow_app):
        with trio.move_on_after(1):
            while True:
                await slow_client.send_all(bytes(MIB))
        async with rig.joined(listener) as (client, app):
            with trio.fail_after(5):
                await client.send_all(b"through")
                assert await app.receive_some(100) == b"through"
        assert rig.client.pod.pool.statistics().tunnels == 1
        reset(slow_client)
        await expect_reset(slow_app, within_s=5)


@pytest.mark.compat
async def test_the_record_shows_who_where_and_how_much(rig: Rig) -> None:
    async with rig.joined() as (client, app):
        await client.send_all(b"12345")
        assert await app.receive_some(100) == b"12345"
        await app.send_all(b"123")
        assert await client.receive_some(100) == b"123"
        (out,), (into,) = rig.client.connections.list(), rig.server.connections.list()
        assert (out.direction, out.transport, out.state) == ("outbound", "HBONE", "open")
        assert (str(out.destination), str(out.upstream)) == (f"{HBONE_VIP}:8080", f"{SERVER}:15008")
        assert (str(into.source.ip), str(into.upstream)) == (CLIENT, f"{SERVER}:8080")
        assert out.service == "db/hbone.db.svc"
        assert str(out.peer_identity) == "spiffe://cluster.local/ns/db/sa/server"
        assert str(into.peer_identity) == "spiffe://cluster.local/ns/web/sa/client"
        assert (out.bytes_sent, out.bytes_received) == (5, 3)
        assert (into.bytes_sent, into.bytes_received) == (5, 3)


def streams_with_app() -> list[TunnelStream]:
    """The server side's live streams; nothing else shows what they hold."""
    return [
        each
        for each in gc.get_objects()
        if isinstance(each, TunnelStream) and each.tunnel._server and each._app is not None
    ]


async def test_an_end_right_behind_many_chunks_is_read_at_once(rig: Rig) -> None:
    """Whoever has more to read has a turn later; the end may come as an event before it."""
    data = os.urandom(3 * MIB)
    for _ in range(20):
        async with rig.joined() as (client, app):
            with trio.fail_after(5):
                async with trio.open_nursery() as nursery:

                    async def send(client: trio.SocketStream = client) -> None:
                        await client.send_all(data)
                        await client.send_eof()

                    nursery.start_soon(send)
                    assert await read_all(app) == data
                await app.send_eof()
                assert await read_all(client) == b""
