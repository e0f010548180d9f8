"""The pool, and the life and death of tunnels."""

from __future__ import annotations

import gc
import os
import resource
import socket
import struct
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
import trio
from h2.errors import ErrorCodes
from OpenSSL import SSL

from meshbpf.agent.core.tuning import Tuning
from meshbpf.agent.runtime import tunnel as tunnel_module
from meshbpf.agent.runtime.inbound import Inbound
from meshbpf.agent.runtime.outbound import EARLY_BYTES, SaidAlready
from meshbpf.agent.runtime.sockets import DialError
from meshbpf.agent.runtime.stream import TunnelStream
from meshbpf.agent.runtime.tunnel import Tunnel
from meshbpf.agent.wire import headers
from tests.unit.forwarder.rig import (
    CLIENT,
    CLIENT_2,
    DENY_WEB,
    HBONE_VIP,
    PORT,
    SERVER,
    Rig,
    expect_reset,
    read_all,
    reset,
)

pytestmark = pytest.mark.root


async def exchange(rig: Rig, listener: trio.SocketListener) -> None:
    """One short connection from beginning to end."""
    async with rig.joined(listener) as (client, app):
        await client.send_all(b"ping")
        assert await app.receive_some(100) == b"ping"
        await app.send_eof()
        assert await client.receive_some(100) == b""
        await client.send_eof()
        assert await app.receive_some(100) == b""


async def settled(condition: Callable[[], bool], within_s: float = 2.0) -> None:
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110 - nothing announces what is waited for
            await trio.sleep(0.01)


@pytest.mark.compat
async def test_connections_of_one_pod_share_a_tunnel(rig: Rig) -> None:
    async with rig.listen() as listener:
        for _ in range(5):
            await exchange(rig, listener)
    pool = rig.client.pod.pool.statistics()
    assert (pool.tunnels, pool.dialed, pool.reused) == (1, 1, 4)


@pytest.mark.compat
async def test_another_source_address_has_its_own_tunnel(rig: Rig) -> None:
    async with (
        rig.listen() as listener,
        rig.joined(listener, source=CLIENT),
        rig.joined(listener, source=CLIENT_2),
    ):
        seen = {str(each.source.ip) for each in rig.server.connections.list()}
        assert seen == {CLIENT, CLIENT_2}
        assert rig.client.pod.pool.statistics().dialed == 2


@pytest.mark.compat
async def test_many_at_once_wait_for_one_dial_and_a_hundred_share_it(rig: Rig) -> None:
    async with rig.listen(backlog=300) as listener, AsyncExitStack() as stack:
        async with trio.open_nursery() as nursery:

            async def one() -> None:
                await stack.enter_async_context(await rig.dial())

            for _ in range(150):
                nursery.start_soon(one)
        with trio.fail_after(20):
            for _ in range(150):
                await stack.enter_async_context(await listener.accept())
        assert rig.client.pod.pool.statistics().dialed == 2
        assert len(rig.server.connections.list()) == 150
    # The first tunnel was full and left the pool: it ends with its streams.
    await settled(lambda: _tunnels() == 2)


@pytest.mark.compat
async def test_a_failed_dial_fails_all_who_waited_for_it(rig: Rig) -> None:
    rig.server.scope.cancel()
    await rig.server.ended.wait()
    for listener in rig.server.listeners.values():
        listener.close()
    clients = [await rig.dial() for _ in range(20)]
    for client in clients:
        async with client:
            await expect_reset(client)


@pytest.mark.compat
async def test_an_idle_tunnel_is_closed_and_a_busy_one_is_not(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel_module, "PING_INTERVAL_S", 0.05)
    for end in (rig.client, rig.server):
        end.pod.tuning = Tuning(tunnel_idle_s=0.2)
    async with rig.listen() as listener:
        async with rig.joined(listener):
            await trio.sleep(0.5)
            assert rig.client.pod.pool.statistics().tunnels == 1
        await settled(lambda: rig.client.pod.pool.statistics().tunnels == 0)
        await settled(lambda: _tunnels() == 0)
        await exchange(rig, listener)


@pytest.mark.compat
async def test_a_peer_that_falls_silent_ends_the_tunnel(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel_module, "PING_INTERVAL_S", 0.1)
    monkeypatch.setattr(tunnel_module, "PING_TIMEOUT_S", 0.3)
    async with rig.joined() as (client, app):
        # Only now the answer has come for certain: without it the client
        # would ask again on a new tunnel.
        await client.send_all(b"x")
        assert await app.receive_some(1) == b"x"
        await app.send_all(b"y")
        assert await client.receive_some(1) == b"y"
        (theirs,) = [each for each in _live_tunnels() if each._server]
        # The peer's process hangs: its kernel still takes the bytes.
        theirs.reactor.remove(theirs._sock.fileno())
        monkeypatch.setattr(theirs, "_transmit_soon", lambda: None)
        await expect_reset(client, within_s=10)


@pytest.mark.compat
async def test_a_tunnel_that_died_unnoticed_costs_no_connection(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig.listen() as listener:
        await exchange(rig, listener)
        (theirs,) = [each for each in _live_tunnels() if each._server]
        # What the client learns only when it asks for a stream.
        monkeypatch.setattr(theirs, "_on_request", lambda tunnel, *_: tunnel.close("gone"))
        await exchange(rig, listener)
    assert rig.client.pod.pool.statistics().dialed == 2
    assert rig.client.connections.statistics().failed == 0


def _dialed_and_said(rig: Rig, text: bytes) -> trio.SocketStream:
    """A client that has said something before its agent gets to accept."""
    sock = rig.client.netns.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.bind((CLIENT, 0))
    sock.connect((HBONE_VIP, PORT))
    sock.sendall(text)
    sock.setblocking(False)
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


async def test_what_a_client_has_said_already_comes_with_its_question(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered: list[bytes] = []
    respond = Tunnel.respond

    def noted(self: Tunnel, stream: TunnelStream, *args: Any, **options: Any) -> bool:
        answered.append(bytes(stream.pending))
        return respond(self, stream, *args, **options)

    monkeypatch.setattr(Tunnel, "respond", noted)
    long = os.urandom(3 * EARLY_BYTES)
    async with rig.listen() as listener:
        for text, early in ((b"first", b"first"), (long, long[:EARLY_BYTES])):
            async with _dialed_and_said(rig, text) as client, await listener.accept() as app:
                await client.send_eof()
                assert await read_all(app) == text
            assert answered.pop() == early
    await settled(lambda: not rig.client.connections.list())
    assert rig.client.connections.statistics().bytes_sent == 5 + len(long)


async def test_what_went_into_a_dead_tunnel_is_said_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig.listen() as listener:
        await exchange(rig, listener)
        (theirs,) = [each for each in _live_tunnels() if each._server]
        monkeypatch.setattr(theirs, "_on_request", lambda tunnel, *_: tunnel.close("gone"))
        async with _dialed_and_said(rig, b"only once") as client, await listener.accept() as app:
            await client.send_eof()
            assert await read_all(app) == b"only once"
    assert rig.client.pod.pool.statistics().dialed == 2


async def test_a_client_that_broke_off_before_its_question_was_asked_is_reset(rig: Rig) -> None:
    async with rig.listen() as listener:
        await exchange(rig, listener)
        reset(_dialed_and_said(rig, b"never mind"))
        with trio.move_on_after(0.2) as waited:
            await listener.accept()
        assert waited.cancelled_caught, "the app hears nothing of it"
        await settled(lambda: not rig.server.connections.list())
        await exchange(rig, listener)


def test_what_a_socket_said_is_taken_once_and_its_end_and_break_are_left_to_be_seen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def pair() -> tuple[socket.socket, socket.socket]:
            far = socket.create_connection(server.getsockname())
            near, _ = server.accept()
            near.setblocking(False)
            return far, near

        far, near = pair()
        with far, near:
            assert SaidAlready(near)(100) == b""
            far.sendall(b"hello")
            said = SaidAlready(near)
            assert (said(3), said.taken, near.recv(9)) == (b"hel", 3, b"lo")
            assert said(3) == b"hel"
            with pytest.raises(DialError):
                said(2)
            far.shutdown(socket.SHUT_WR)
            assert SaidAlready(near)(100) == near.recv(9) == b""
        far, near = pair()
        with near:
            far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            far.close()
            with pytest.raises(ConnectionResetError):
                SaidAlready(near)(100)


async def test_what_was_said_to_a_peer_that_refuses_goes_nowhere(rig: Rig) -> None:
    rig.set_policies(DENY_WEB)
    async with rig.listen() as listener, _dialed_and_said(rig, b"unheard") as client:
        await expect_reset(client)
        with trio.move_on_after(0.2) as waited:
            await listener.accept()
        assert waited.cancelled_caught
    assert rig.client.connections.statistics().bytes_sent == 0


@pytest.mark.parametrize("ended", [True, False], ids=["whole", "cut"])
async def test_an_answer_that_comes_with_its_reset_reaches_the_client(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    async def serve(
        _self: Inbound, tunnel: Tunnel, _request: object, stream: TunnelStream, *_more: object
    ) -> None:
        tunnel._spoke_in = tunnel.reactor.rounds  # so that all leaves at once
        tunnel.respond(stream, headers.response(200), end_stream=False)
        tunnel.send_bytes(stream, b"no, and why")
        if ended:
            stream._local_ended = True
            tunnel.end_stream(stream)
        tunnel.reset_stream(stream, ErrorCodes.CANCEL)

    monkeypatch.setattr(Inbound, "_serve_stream", serve)
    for text in (b"asked at once", b""):
        async with _dialed_and_said(rig, text) as client:
            got = b""
            try:
                with trio.fail_after(2):
                    while data := await client.receive_some(100):
                        got += data
            except trio.BrokenResourceError:
                assert not ended
            else:
                assert ended
            assert got == b"no, and why"


async def test_the_end_of_a_forwarder_reaches_all_peers_within_two_seconds(rig: Rig) -> None:
    async with rig.joined() as (client, app):
        rig.server.scope.cancel()
        with trio.fail_after(2):
            await rig.server.ended.wait()
            await expect_reset(client)
            await expect_reset(app)


async def test_the_end_of_the_clients_forwarder_reaches_the_app(rig: Rig) -> None:
    async with rig.joined() as (client, app):
        rig.client.scope.cancel()
        await expect_reset(app)
        await expect_reset(client)


async def test_a_renewed_certificate_serves_new_tunnels_while_old_ones_go_on(rig: Rig) -> None:
    async with rig.listen() as listener, rig.joined(listener) as (client, app):
        before = _server_contexts()
        rig.identities.renew()
        async with rig.joined(listener, source=CLIENT_2):
            assert len(before) == 1
            assert len(_server_contexts()) == 2
            assert before < _server_contexts()
        await client.send_all(b"old but alive")
        assert await app.receive_some(100) == b"old but alive"


async def test_connections_leave_no_descriptor_task_or_record_behind(rig: Rig) -> None:
    async with rig.listen() as listener:
        await exchange(rig, listener)
        await trio.sleep(0.1)
        before = _footprint()
        for _ in range(100):
            await exchange(rig, listener)
            async with await rig.dial(port=81) as refused:
                await expect_reset(refused)
        await settled(lambda: _footprint() == before)
    assert rig.client.connections.list() == []
    assert rig.server.connections.list() == []


async def test_running_out_of_descriptors_delays_and_breaks_nothing(rig: Rig) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with rig.listen() as listener:
        await exchange(rig, listener)
        socks = [rig.client.netns.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(3)]
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (_first_free_descriptor(), hard))
            for sock in socks:
                sock.bind((CLIENT, 0))
                sock.connect((HBONE_VIP, 8080))
            await trio.sleep(0.3)
            assert rig.client.forwarder.statistics().accept_failures > 0
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        with trio.fail_after(3):
            for sock in socks:
                await (await listener.accept()).aclose()
                sock.close()
        await exchange(rig, listener)


@pytest.mark.compat
async def test_garbage_at_the_hbone_port_ends_only_itself(rig: Rig) -> None:
    async with rig.joined() as (client, app):
        for garbage in (
            b"GET / HTTP/1.1\r\n\r\n",
            os.urandom(300),
            b"\x16\x03\x01\x02\x00" + bytes(512),
        ):
            raw = rig.client.netns.socket(2, 1)
            with raw:
                raw.bind((CLIENT, 0))
                raw.connect((SERVER, 15008))
                raw.sendall(garbage)
                await trio.sleep(0.05)
        await client.send_all(b"alive")
        assert await app.receive_some(100) == b"alive"


def _live_tunnels() -> list[Tunnel]:
    return [each for each in gc.get_objects() if isinstance(each, Tunnel) and not each.closed]


def _tunnels() -> int:
    return len(_live_tunnels())


def _server_contexts() -> set[SSL.Context]:
    tunnels = [each for each in _live_tunnels() if each._server]
    return {each._channel._connection.get_context() for each in tunnels}


def _footprint() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), trio.lowlevel.current_statistics().tasks_living


def _first_free_descriptor() -> int:
    """With this as the limit, the process can open nothing more."""
    probe = os.dup(0)
    os.close(probe)
    return probe
