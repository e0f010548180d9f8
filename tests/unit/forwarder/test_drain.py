"""The orderly end: streams finish, tunnels go with their last one, nothing new is taken."""

from __future__ import annotations

import contextlib
import resource
import socket

import pytest
import trio

from meshbpf.agent.core.tuning import MIB
from meshbpf.agent.runtime import forwarder
from meshbpf.agent.runtime.bounds import Bounds
from tests.unit.forwarder.rig import HBONE_VIP, PORT, Rig, expect_reset
from tests.unit.forwarder.test_tunnels import exchange, settled

pytestmark = [pytest.mark.root, pytest.mark.compat]


async def test_a_stream_outlives_the_goaway_of_its_tunnel_and_ends_well(rig: Rig) -> None:
    async with rig.listen() as listener:
        async with rig.joined(listener) as (client, app):
            await client.send_all(b"before")
            assert await app.receive_some(100) == b"before"
            rig.server.forwarder.drain()
            await settled(lambda: rig.client.pod.pool.statistics().tunnels == 0)
            await client.send_all(b"after")
            assert await app.receive_some(100) == b"after"
            await app.send_all(b"and back")
            await app.send_eof()
            assert await client.receive_some(100) == b"and back"
            await client.send_eof()
            assert await app.receive_some(100) == b""
        with trio.fail_after(1.0):  # the client closes as soon as it may: nobody lingers
            await rig.server.forwarder.idle()


async def test_the_next_connection_after_a_goaway_has_a_tunnel_of_its_own(rig: Rig) -> None:
    async with rig.listen() as listener, rig.joined(listener):
        rig.server.forwarder.drain()
        await settled(lambda: rig.client.pod.pool.statistics().tunnels == 0)
        await exchange(rig, listener)
        assert rig.client.pod.pool.statistics().dialed == 2


async def test_an_idle_tunnel_ends_at_once_when_drained(rig: Rig) -> None:
    async with rig.listen() as listener:
        await exchange(rig, listener)
        assert rig.server.forwarder.carried == 1, "the tunnel stays in the client's pool"
        rig.server.forwarder.drain()
        with trio.fail_after(1.0):
            await rig.server.forwarder.idle()


async def test_a_client_that_drains_gives_its_idle_tunnel_up(rig: Rig) -> None:
    async with rig.listen() as listener:
        await exchange(rig, listener)
        rig.client.forwarder.drain()
        assert rig.client.pod.pool.statistics().tunnels == 0
        with trio.fail_after(1.0):
            await rig.server.forwarder.idle()


async def test_bytes_that_wait_when_the_last_stream_ends_still_arrive(rig: Rig) -> None:
    """The peer reads late: what is in our backlog and in the kernel is not cut off."""
    size = 8 << 20
    async with rig.listen() as listener, rig.joined(listener) as (client, app):
        rig.server.forwarder.drain()
        await app.send_eof()
        assert await client.receive_some(100) == b""

        async def send() -> None:
            await client.send_all(bytes(size))
            await client.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await trio.sleep(0.2)
            got = 0
            while data := await app.receive_some(1 << 16):
                got += len(data)
            assert got == size


async def test_while_the_gate_is_closed_dials_wait_and_are_served_when_it_opens(rig: Rig) -> None:
    async with rig.listen() as listener:
        rig.client.forwarder.gate.close()
        client = await rig.dial()
        await client.send_all(b"hello")
        await trio.sleep(0.1)
        assert rig.client.forwarder.carried == 0
        rig.client.forwarder.gate.open()
        with trio.fail_after(2.0):
            app = await listener.accept()
            assert await app.receive_some(100) == b"hello"
        await client.aclose()
        await app.aclose()


async def test_a_pod_at_its_bound_is_refused_at_once_and_another_is_not(rig: Rig) -> None:
    rig.client.forwarder._bounds = Bounds(descriptors=100_000, per_pod=2)
    async with rig.listen() as listener, rig.joined(listener), rig.joined(listener):
        with contextlib.suppress(ConnectionResetError):  # it may come before connect() returns
            third = await rig.dial()
            await expect_reset(third)
            await third.aclose()
        assert rig.client.forwarder.turned_away() == {rig.client.pod.key: 1}
        assert rig.server.forwarder.turned_away() == {rig.server.pod.key: 0}
    await settled(lambda: rig.client.forwarder.carried == 0)
    async with rig.listen() as listener:
        await exchange(rig, listener)


async def test_who_does_not_read_is_reset_and_who_does_goes_on(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three megabytes wait for an app that reads nothing: more than the pod may hold."""
    monkeypatch.setattr(forwarder, "MEMORY_LOOK_S", 0.05)
    side = rig.server
    side.forwarder._bounds = Bounds(descriptors=100_000, memory_bytes=2 * MIB)
    async with (
        rig.listen() as listener,
        rig.joined(listener) as (stuck, _),
        rig.joined(listener) as (client, app),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(side.forwarder.bound_memory)
        nursery.start_soon(_send_until_reset, stuck)
        await settled(lambda: side.forwarder.cut_for_memory() == {side.pod.key: 1})
        await settled(lambda: side.forwarder.buffered() == {side.pod.key: 0})
        await client.send_all(b"still here")
        assert await app.receive_some(100) == b"still here"
        nursery.cancel_scope.cancel()
    await settled(lambda: not side.pod.streams)


async def _send_until_reset(client: trio.SocketStream) -> None:
    with contextlib.suppress(trio.BrokenResourceError):
        while True:
            await client.send_all(bytes(256 * 1024))


async def test_want_of_descriptors_is_told_for_a_while_and_then_it_is_over(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarder, "EXHAUSTED_FOR_S", 0.3)
    side = rig.client.forwarder
    assert not side.exhausted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with rig.listen() as listener:
        await exchange(rig, listener)
        with rig.client.netns.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            try:
                sock.connect_ex((HBONE_VIP, PORT))
                await settled(lambda: side.exhausted)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await settled(lambda: not side.exhausted)
        await exchange(rig, listener)
