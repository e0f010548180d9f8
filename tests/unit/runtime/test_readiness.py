"""Readiness: 200 only when nothing is pending, over both families."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from meshbpf.agent.core.errors import Exit, MeshbpfError
from meshbpf.agent.runtime import readiness
from meshbpf.agent.runtime.readiness import Readiness

READY = b"GET /healthz/ready HTTP/1.1\r\nHost: x\r\n\r\n"


@asynccontextmanager
async def served(state: Readiness) -> AsyncIterator[int]:
    listener = readiness.open_listener(0)
    port = listener.getsockname()[1]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(readiness.serve, listener, state)
        yield port
        nursery.cancel_scope.cancel()


async def exchange(port: int, request: bytes, address: str = "127.0.0.1") -> tuple[int, bytes]:
    """Status and body."""
    with trio.fail_after(10):
        async with await trio.open_tcp_stream(address, port) as stream:
            await stream.send_all(request)
            received = b""
            async for data in stream:
                received += data
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def test_tasks_are_struck_off_and_conditions_can_fail_again() -> None:
    holds = True
    state = Readiness("b", "a")
    state.require("c", lambda: holds)
    assert state.pending() == ("a", "b")
    state.done("a")
    state.done("b")
    state.done("b")
    assert state.pending() == ()
    holds = False
    assert state.pending() == ("c",)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_pending_tasks_are_told_sorted_until_all_are_done(address: str) -> None:
    state = Readiness("zebra", "ape")
    async with served(state) as port:
        assert await exchange(port, READY, address) == (
            500,
            b"not ready, pending:\nape\nzebra\n",
        )
        state.done("ape")
        state.done("zebra")
        assert await exchange(port, READY, address) == (200, b"ready\n")


async def test_a_query_and_head_are_understood_and_other_paths_are_not() -> None:
    async with served(Readiness()) as port:
        assert await exchange(port, READY.replace(b"ready ", b"ready?verbose ")) == (
            200,
            b"ready\n",
        )
        assert await exchange(port, READY.replace(b"GET", b"HEAD")) == (200, b"")
        assert (await exchange(port, READY.replace(b"GET", b"POST")))[0] == 405
        assert (await exchange(port, READY.replace(b"/ready", b"/live")))[0] == 404


async def test_what_is_not_http_is_dropped_and_others_are_served() -> None:
    async with served(Readiness()) as port:
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(b"\x16\x03\x01\x00\xff not http\r\n\r\n")
            with trio.fail_after(5):
                assert await stream.receive_some() == b""
        assert (await exchange(port, READY))[0] == 200


async def test_a_client_that_sends_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "CLIENT_S", 0.2)
    async with (
        served(Readiness()) as port,
        await trio.open_tcp_stream("127.0.0.1", port) as stream,
    ):
        with trio.fail_after(5):
            assert await stream.receive_some() == b""


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_taken_port_is_named(family: socket.AddressFamily) -> None:
    with socket.socket(family) as taken:
        if family == socket.AF_INET6:
            taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(MeshbpfError, match=f"port {port} is taken") as caught:
            readiness.open_listener(port)
        assert caught.value.code == "port-in-use"
        assert caught.value.exit_status == Exit.FAILED
