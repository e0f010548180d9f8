"""The gRPC client against servers on a unix socket: ours on h2, and grpcio's own."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import h2.settings
import pytest
import trio
from hyperframe import frame as hf

from meshbpf.agent.runtime.grpc_client import (
    CONNECTION_WINDOW_BYTES,
    WINDOW_BYTES,
    Channel,
    open_channel,
)
from meshbpf.agent.wire.grpc import GrpcError, Status, encode

from .grpc_server import OK_HEADERS, Connection, Handler, Server, ServerCall, serving

METHOD = "test.Echo/Call"
LIMIT_S = 10.0


@asynccontextmanager
async def rig(
    tmp_path: Path,
    handler: Handler,
    *,
    settings: dict[int, int] | None = None,
    max_message_bytes: int = 64 << 20,
) -> AsyncIterator[tuple[Channel, Server]]:
    """A server with one method and a channel to it; the test has ten seconds."""
    with trio.fail_after(LIMIT_S):
        async with serving(tmp_path / "s", {METHOD: handler}, settings) as server:
            stream = await trio.open_unix_socket(str(server.path))
            async with open_channel(
                stream, "localhost", max_message_bytes=max_message_bytes
            ) as channel:
                yield channel, server


async def echo(call: ServerCall) -> None:
    await call.answer(await call.request())


async def never(_call: ServerCall) -> None:
    await trio.sleep_forever()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 (the server's state has no event)
        await trio.sleep(0.005)


async def test_one_message_there_and_one_back(tmp_path: Path) -> None:
    async with rig(tmp_path, echo) as (channel, server):
        assert await channel.unary(METHOD, b"hello", timeout_s=1) == b"hello"
        assert await channel.unary(METHOD, b"", timeout_s=1) == b""
        assert channel.statistics().calls == 2
        assert channel.statistics().open_calls == 0
        assert server.connections[0].calls[1].headers["grpc-timeout"] == "1000m"


async def test_megabytes_pass_both_ways_through_small_windows(tmp_path: Path) -> None:
    body = bytes(range(256)) * 20_000  # five windows of ours, 78 of the server's
    async with rig(tmp_path, echo) as (channel, _):
        assert await channel.unary(METHOD, body, timeout_s=LIMIT_S) == body


async def test_calls_side_by_side_do_not_mix(tmp_path: Path) -> None:
    async with rig(tmp_path, echo) as (channel, _):

        async def one(number: int) -> None:
            body = bytes([number]) * (number * 5000)
            assert await channel.unary(METHOD, body, timeout_s=LIMIT_S) == body

        async with trio.open_nursery() as nursery:
            for number in range(40):
                nursery.start_soon(one, number)
        assert channel.statistics().calls == 40


async def test_calls_beyond_the_servers_limit_wait_for_their_turn(tmp_path: Path) -> None:
    codes = h2.settings.SettingCodes
    at_once: list[int] = []

    async def counted(call: ServerCall) -> None:
        await call.request()
        at_once.append(call.server.h2.open_inbound_streams)
        await trio.sleep(0.01)
        await call.answer(b"done")

    limits = {int(codes.MAX_CONCURRENT_STREAMS): 2}
    async with rig(tmp_path, counted, settings=limits) as (channel, _):
        await channel.unary(METHOD, b"", timeout_s=1)  # the server's SETTINGS have come
        async with trio.open_nursery() as nursery:
            for _number in range(9):
                nursery.start_soon(lambda: channel.unary(METHOD, b"", timeout_s=LIMIT_S))
    assert len(at_once) == 10
    assert max(at_once) == 2


async def test_a_message_cut_into_single_bytes_arrives_whole(tmp_path: Path) -> None:
    async def dripping(call: ServerCall) -> None:
        await call.start()
        await call.send(b"one by one", piece=1)
        await call.send(encode(b"two") + encode(b"in one frame"), raw=True)
        await call.end()

    async with rig(tmp_path, dripping) as (channel, _), channel.call(METHOD) as call:
        await call.send(b"", end=True)
        assert [message async for message in call] == [b"one by one", b"two", b"in one frame"]


async def test_a_consumer_that_lags_holds_the_server_back(tmp_path: Path) -> None:
    async def flood(call: ServerCall) -> None:
        await call.start()
        for _ in range(400):
            await call.send(b"x" * 10_000)
        await call.end()

    async with rig(tmp_path, flood) as (channel, server), channel.call(METHOD) as lagging:
        await lagging.send(b"", end=True)
        await lagging.receive()
        sent = -1
        while server.connections[0].data_sent != sent:
            sent = server.connections[0].data_sent
            await trio.sleep(0.05)
        # One message is taken and its credit is kept until the queue is empty.
        assert WINDOW_BYTES // 2 <= sent <= WINDOW_BYTES + 16_384
        assert sum([1 async for _ in lagging]) == 399


async def test_a_call_that_lags_holds_up_no_other(tmp_path: Path) -> None:
    async def flood_or_echo(call: ServerCall) -> None:
        if await call.request() == b"flood":
            await call.start()
            for _ in range(1000):
                await call.send(b"x" * 10_000)
        await call.answer(b"quick")

    async with (
        rig(tmp_path, flood_or_echo) as (channel, server),
        channel.call(METHOD) as one,
        channel.call(METHOD) as two,
    ):
        await one.send(b"flood", end=True)
        await two.send(b"flood", end=True)
        await until(lambda: server.connections[0].data_sent >= 2 * WINDOW_BYTES)
        assert await channel.unary(METHOD, b"", timeout_s=2) == b"quick"


async def test_what_an_abandoned_call_received_is_given_back(tmp_path: Path) -> None:
    async def flood(call: ServerCall) -> None:
        await call.start()
        for _ in range(100):
            await call.send(b"x" * 10_000)
        await call.end()

    async with rig(tmp_path, flood) as (channel, server):
        # More than the connection's window, in calls that nobody read.
        for _ in range(CONNECTION_WINDOW_BYTES // 1_000_000 + 3):
            before = server.connections[0].data_sent if server.connections else 0
            async with channel.call(METHOD) as call:
                await call.send(b"", end=True)
                await until(lambda: server.connections[0].data_sent >= before + 1_000_000)  # noqa: B023
        async with channel.call(METHOD) as call:
            await call.send(b"", end=True)
            assert sum([1 async for _ in call]) == 100


async def test_an_oversized_message_ends_the_call_and_not_the_connection(tmp_path: Path) -> None:
    async with rig(tmp_path, echo, max_message_bytes=1000) as (channel, _):
        with pytest.raises(GrpcError, match="1001 bytes, the limit is 1000") as caught:
            await channel.unary(METHOD, b"x" * 1001, timeout_s=1)
        assert caught.value.status is Status.RESOURCE_EXHAUSTED
        assert await channel.unary(METHOD, b"x" * 1000, timeout_s=1) == b"x" * 1000


async def test_a_deadline_ends_the_call_and_resets_its_stream(tmp_path: Path) -> None:
    async with rig(tmp_path, never) as (channel, server):
        before = trio.current_time()
        with pytest.raises(GrpcError, match="no answer in") as caught:
            await channel.unary(METHOD, b"", timeout_s=0.1)
        assert trio.current_time() - before < 1
        assert caught.value.status is Status.DEADLINE_EXCEEDED
        await until(lambda: server.connections[0].calls[1].reset_code == 8)
        assert not channel.broken


async def test_a_deadline_holds_while_the_server_takes_nothing(tmp_path: Path) -> None:
    # Its window is never topped up: the request itself gets stuck.
    async with rig(tmp_path, never) as (channel, _):
        with pytest.raises(GrpcError) as caught:
            await channel.unary(METHOD, b"x" * 200_000, timeout_s=0.2, metadata=[("x-hold", "1")])
        assert caught.value.status is Status.DEADLINE_EXCEEDED


async def test_a_cancelled_call_leaves_the_connection_whole(tmp_path: Path) -> None:
    async with rig(tmp_path, echo) as (channel, server):
        for pause_s in (0.0, 0.001, 0.003, 0.01):
            with trio.move_on_after(pause_s) as scope:
                while True:
                    await channel.unary(METHOD, b"x" * 300_000, timeout_s=5)
            assert scope.cancelled_caught
        assert channel.statistics().open_calls == 0
        assert await channel.unary(METHOD, b"after", timeout_s=2) == b"after"
        assert len(server.connections) == 1


async def test_a_call_left_early_is_reset(tmp_path: Path) -> None:
    async def endless(call: ServerCall) -> None:
        await call.start()
        while call.reset_code is None:
            await call.send(b"event")
            await trio.sleep(0.005)

    async with rig(tmp_path, endless) as (channel, server):
        async with channel.call(METHOD) as call:
            await call.send(b"", end=True)
            async for message in call:
                assert message == b"event"
                break
        await until(lambda: server.connections[0].calls[1].reset_code == 8)


async def test_a_status_in_trailers_comes_after_the_messages(tmp_path: Path) -> None:
    async def failing(call: ServerCall) -> None:
        await call.start()
        await call.send(b"first")
        await call.end(("grpc-status", "5"), ("grpc-message", "no%20such%20pod"))

    async with rig(tmp_path, failing) as (channel, _):
        async with channel.call(METHOD) as call:
            await call.send(b"", end=True)
            assert await call.receive() == b"first"
            with pytest.raises(GrpcError, match="NOT_FOUND: no such pod"):
                await call.receive()
        with pytest.raises(GrpcError, match="NOT_FOUND"):
            await channel.unary(METHOD, b"", timeout_s=1)


async def test_trailers_alone_carry_the_status(tmp_path: Path) -> None:
    async def refusing(call: ServerCall) -> None:
        await call.end(*OK_HEADERS, ("grpc-status", "12"), ("grpc-message", "unknown service"))

    async with rig(tmp_path, refusing) as (channel, _):
        with pytest.raises(GrpcError, match="UNIMPLEMENTED: unknown service"):
            await channel.unary(METHOD, b"", timeout_s=1)


async def test_an_end_without_a_status_is_no_success(tmp_path: Path) -> None:
    async def silent(call: ServerCall) -> None:
        await call.start()
        await call.send(b"half an answer")
        call.server.h2.end_stream(call.stream_id)
        await call.server.flush()

    async with rig(tmp_path, silent) as (channel, _):
        with pytest.raises(GrpcError, match="without a status") as caught:
            await channel.unary(METHOD, b"", timeout_s=1)
        assert caught.value.status is Status.INTERNAL


@pytest.mark.parametrize(
    ("code", "status"), [(7, Status.UNAVAILABLE), (2, Status.INTERNAL), (8, Status.CANCELLED)]
)
async def test_a_reset_ends_its_call_alone(tmp_path: Path, code: int, status: Status) -> None:
    async def reset_or_echo(call: ServerCall) -> None:
        body = await call.request()
        if body == b"reset":
            call.server.h2.reset_stream(call.stream_id, code)
            await call.server.flush()
        else:
            await call.answer(body)

    async with rig(tmp_path, reset_or_echo) as (channel, _):
        with pytest.raises(GrpcError, match="reset the stream") as caught:
            await channel.unary(METHOD, b"reset", timeout_s=1)
        assert caught.value.status is status
        assert await channel.unary(METHOD, b"next", timeout_s=1) == b"next"


async def test_a_reset_after_the_answer_takes_nothing_back(tmp_path: Path) -> None:
    async def hasty(call: ServerCall) -> None:
        await call.start()
        await call.send(b"enough")
        await call.end()
        call.server.h2.reset_stream(call.stream_id, 0)
        await call.server.flush()

    async with rig(tmp_path, hasty) as (channel, _), channel.call(METHOD) as call:
        await trio.sleep(0.05)  # the whole answer, and the reset, are there
        assert await call.receive() == b"enough"
        assert await call.receive() is None


async def goaway(connection: Connection, last: int) -> None:
    """As Go's servers announce an orderly end; h2 would call the connection closed."""
    await connection.write(hf.GoAwayFrame(last_stream_id=last).serialize())


async def test_after_goaway_calls_go_on_and_new_ones_are_refused(tmp_path: Path) -> None:
    async def leaving(call: ServerCall) -> None:
        body = await call.request()
        await goaway(call.server, 2**31 - 1)
        await goaway(call.server, call.stream_id)
        await trio.sleep(0.05)
        await call.answer(body)

    async with rig(tmp_path, leaving) as (channel, _):
        assert await channel.unary(METHOD, b"x" * 300_000, timeout_s=2) == b"x" * 300_000
        assert channel.broken
        with pytest.raises(GrpcError, match="going away") as caught:
            await channel.unary(METHOD, b"", timeout_s=1)
        assert caught.value.status is Status.UNAVAILABLE


async def test_goaway_ends_calls_that_the_server_will_not_serve(tmp_path: Path) -> None:
    async def leaving(call: ServerCall) -> None:
        await call.request()
        await goaway(call.server, 0)
        await trio.sleep_forever()

    async with rig(tmp_path, leaving) as (channel, _):
        with pytest.raises(GrpcError, match="going away") as caught:
            await channel.unary(METHOD, b"", timeout_s=5)
        assert caught.value.status is Status.UNAVAILABLE


async def test_a_connection_that_breaks_ends_every_call(tmp_path: Path) -> None:
    async def hang_up(call: ServerCall) -> None:
        if await call.request() == b"now":
            await trio.sleep(0.05)
            await call.server.stream.aclose()
        await trio.sleep_forever()

    async with rig(tmp_path, hang_up) as (channel, _):
        failures = []

        async def one(body: bytes) -> None:
            try:
                await channel.unary(METHOD, body, timeout_s=5)
            except GrpcError as error:
                failures.append(error.status)

        async with trio.open_nursery() as nursery:
            for body in (b"a", b"b", b"now"):
                nursery.start_soon(one, body)
        assert failures == [Status.UNAVAILABLE] * 3
        with pytest.raises(GrpcError, match="UNAVAILABLE"):
            await channel.unary(METHOD, b"", timeout_s=1)


async def test_a_server_that_breaks_http2_is_told_from_one_that_left(tmp_path: Path) -> None:
    async def babble(call: ServerCall) -> None:
        await call.request()
        await call.server.write(b"\x00\x00\x05\x08\x00\x00\x00\x00\x01tooww" * 3)

    async with rig(tmp_path, babble) as (channel, _):
        with pytest.raises(GrpcError, match="broke HTTP/2"):
            await channel.unary(METHOD, b"", timeout_s=2)


async def test_the_blocks_own_error_comes_out_as_it_is(tmp_path: Path) -> None:
    async with rig(tmp_path, echo) as (_, server):
        stream = await trio.open_unix_socket(str(server.path))
        with pytest.raises(ZeroDivisionError):
            async with open_channel(stream, "localhost") as channel, channel.call(METHOD):
                raise ZeroDivisionError


async def test_a_bad_utf8_message_is_shown_as_far_as_it_goes(tmp_path: Path) -> None:
    async def garbled(call: ServerCall) -> None:
        call.server.h2.send_headers(
            call.stream_id,
            [(b":status", b"200"), (b"grpc-status", b"2"), (b"grpc-message", b"caf\xe9")],
            end_stream=True,
        )
        await call.server.flush()

    async with rig(tmp_path, garbled) as (channel, _):
        with pytest.raises(GrpcError, match="caf"):
            await channel.unary(METHOD, b"", timeout_s=1)


class RealServer(grpc.GenericRpcHandler):
    """grpcio's own server: what it accepts is gRPC as others mean it."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        match details.method:
            case "/test.Echo/Call":
                return grpc.unary_unary_rpc_method_handler(lambda body, _context: body)
            case "/test.Echo/Refuse":
                return grpc.unary_unary_rpc_method_handler(self.refuse)
            case "/test.Echo/Count":
                return grpc.unary_stream_rpc_method_handler(self.count)
            case "/test.Echo/Sleep":
                return grpc.unary_unary_rpc_method_handler(self.sleep)
        return None

    def refuse(self, _body: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "nöt 100% ready\n")
        return b""

    def count(self, body: bytes, _context: grpc.ServicerContext) -> Iterator[bytes]:
        for number in range(int(body)):
            yield b"%d" % number

    def sleep(self, _body: bytes, context: grpc.ServicerContext) -> bytes:
        while context.is_active():
            time.sleep(0.02)
        return b""


async def test_grpcios_server_understands_us(tmp_path: Path) -> None:
    server = grpc.server(
        ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", 16 << 20)]
    )
    server.add_generic_rpc_handlers((RealServer(),))
    server.add_insecure_port(f"unix:{tmp_path}/real")
    server.start()
    try:
        with trio.fail_after(LIMIT_S):
            stream = await trio.open_unix_socket(f"{tmp_path}/real")
            async with open_channel(stream, "localhost") as channel:
                body = b"x" * (8 << 20)
                assert await channel.unary("test.Echo/Call", body, timeout_s=5) == body
                async with channel.call("test.Echo/Count", timeout_s=5) as call:
                    await call.send(b"1000", end=True)
                    assert sum([1 async for _ in call]) == 1000
                with pytest.raises(GrpcError, match="nöt 100% ready") as caught:
                    await channel.unary("test.Echo/Refuse", b"", timeout_s=5)
                assert caught.value.status is Status.FAILED_PRECONDITION
                with pytest.raises(GrpcError) as caught:
                    await channel.unary("test.Echo/Missing", b"", timeout_s=5)
                assert caught.value.status is Status.UNIMPLEMENTED
                with pytest.raises(GrpcError) as caught:
                    await channel.unary("test.Echo/Sleep", b"", timeout_s=0.2)
                assert caught.value.status is Status.DEADLINE_EXCEEDED
                assert await channel.unary("test.Echo/Call", b"still", timeout_s=5) == b"still"
    finally:
        await trio.to_thread.run_sync(server.stop(0.5).wait)
