"""The orderly end: streams finish, tunnels go with their last one, nothing new is taken."""

from __future__ import annotations

import contextlib

import pytest
import trio

from meshbpf.agent.runtime.bounds import Bounds
from tests.unit.forwarder.rig import Rig, expect_reset
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
