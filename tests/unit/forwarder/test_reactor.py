"""The relay's callbacks and trio's tasks in one loop, in both ways of joining them."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator

import pytest
import trio

from meshbpf.agent.runtime import reactor
from tests.unit.forwarder.rig import Rig, expect_reset, read_all, reset

INSIDE, BESIDE = "inside trio's wait", "beside it"


@pytest.fixture(params=[INSIDE, BESIDE])
def joined(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the reactor of this test is joined to trio."""
    way: str = request.param
    if way == BESIDE:
        monkeypatch.setattr(reactor, "_inside_trio", lambda: None)
    return way


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield ours, theirs


async def test_this_trio_is_made_as_the_inlet_expects() -> None:
    assert reactor._inside_trio() is not None


async def test_a_callback_wakes_a_task_at_once(
    joined: str, ends: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = ends
    loop, seen = reactor.current(), trio.Event()
    assert isinstance(loop, reactor._Inside) == (joined == INSIDE)

    def on_event(flags: int) -> None:
        if flags & reactor.READABLE and ours.recv(100):
            seen.set()

    loop.add(ours.fileno(), on_event)
    theirs.send(b"x")
    with trio.fail_after(2):
        await seen.wait()
    loop.remove(ours.fileno())


@pytest.mark.usefixtures("joined")
async def test_tasks_and_timers_go_on_while_callbacks_never_rest() -> None:
    loop, turns, stopped = reactor.current(), 0, False

    def turn() -> None:
        nonlocal turns
        turns += 1
        if not stopped:
            loop.again(turn)

    loop.again(turn)
    with trio.fail_after(2):
        for _ in range(5):
            await trio.sleep(0.02)
        with trio.move_on_after(0.05) as scope:
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert turns > 100
    stopped = True
    await trio.sleep(0.01)


@pytest.mark.usefixtures("joined")
async def test_a_deadline_is_kept_though_events_come_before_it(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = ends
    loop = reactor.current()
    loop.add(ours.fileno(), lambda _flags: None)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:

        async def chatter() -> None:
            for _ in range(4):
                await trio.to_thread.run_sync(theirs.send, b"x")
                await trio.sleep(0.02)

        nursery.start_soon(chatter)
        await trio.sleep(0.15)
        took = trio.current_time() - began
    loop.remove(ours.fileno())
    assert 0.15 <= took < 0.5


@pytest.mark.usefixtures("joined")
async def test_a_callback_that_fails_costs_its_own_socket_alone(
    ends: tuple[socket.socket, socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = ends
    loop, good = reactor.current(), trio.Event()

    def bad(_flags: int) -> None:
        raise ZeroDivisionError("a bug")

    left, right = socket.socketpair()
    with left, right, caplog.at_level(logging.ERROR):
        loop.add(ours.fileno(), bad)
        loop.add(left.fileno(), lambda _flags: good.set())
        theirs.send(b"x")
        right.send(b"x")
        with trio.fail_after(2):
            await good.wait()
        await trio.sleep(0.01)
        loop.remove(left.fileno())
    assert "a bug" in caplog.text


@pytest.mark.root
@pytest.mark.usefixtures("joined")
async def test_a_relay_works_in_either_way(rig: Rig) -> None:
    data = bytes(range(256)) * 40_000
    async with rig.joined() as (client, app):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.send_all, data)
            received = bytearray()
            with trio.fail_after(10):
                while len(received) < len(data):
                    received += await app.receive_some(65536)
        assert received == data
        await app.send_all(b"done")
        await app.send_eof()
        assert await read_all(client) == b"done"


@pytest.mark.root
async def test_a_clients_reset_is_noticed_while_its_stream_waits_for_a_window(rig: Rig) -> None:
    async with rig.joined() as (client, app):
        with trio.move_on_after(1.0):
            while True:
                await client.send_all(bytes(1 << 20))
        # The app has read nothing: the stream's window is used up.
        assert len(rig.client.connections.list()) == 1
        reset(client)
        with trio.fail_after(2):
            while rig.client.connections.list():  # noqa: ASYNC110 - nothing announces it
                await trio.sleep(0.01)
        await expect_reset(app, within_s=5)
