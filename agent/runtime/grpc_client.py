"""A gRPC client for trio: one HTTP/2 connection, shared by its calls.

One task reads the connection and hands events to the calls; callers write.
Flow control is end to end: the window of a call is topped up only when its
consumer has taken the message, so a consumer that lags holds the server back
and memory stays bounded.

Cancellation: leaving a call early resets its stream (CANCEL); the connection
and the other calls go on. When the connection breaks every call ends with
UNAVAILABLE.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import trio

from meshbpf.agent.wire.grpc import Decoder, GrpcError, Status, encode, request_headers, status_of

READ_BYTES = 64 * 1024
WINDOW_BYTES = 1024 * 1024  # of a stream and beyond that of the connection


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """What a channel did since it was opened."""

    calls: int
    open_calls: int
    messages_received: int
    bytes_received: int


class Call:
    """One call of a Channel; made by `Channel.call`."""

    def __init__(self, channel: Channel, method: str, stream_id: int) -> None:
        self._channel = channel
        self._stream_id = stream_id
        self.method = method
        self._decoder = Decoder(method)
        self._messages: deque[bytes] = deque()
        self._credit_bytes = 0  # received, not yet given back to the server
        self._changed = trio.Event()
        self._window = trio.Event()
        self._error: GrpcError | None = None
        self._ended = False

    async def send(self, message: bytes, *, end: bool = False) -> None:
        """Send one message; waits while the server's window is closed.

        Raises GrpcError when the call has ended meanwhile.
        """
        data = encode(message)
        view = memoryview(data)
        h2c = self._channel._h2
        while view:
            self._check()
            room = min(h2c.local_flow_control_window(self._stream_id), h2c.max_outbound_frame_size)
            if room <= 0:
                self._window = trio.Event()
                await self._window.wait()
                continue
            part, view = view[:room], view[room:]
            h2c.send_data(self._stream_id, bytes(part), end_stream=end and not view)
            await self._channel._flush()

    async def receive(self) -> bytes | None:
        """The next message; None when the call ended with OK.

        Raises GrpcError when it ended otherwise.
        """
        while not self._messages:
            if self._error is not None:
                raise self._error
            if self._ended:
                return None
            self._changed = trio.Event()
            await self._changed.wait()
        message = self._messages.popleft()
        if not self._messages:
            await self._channel._give_back(self._stream_id, self._credit_bytes)
            self._credit_bytes = 0
        return message

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (message := await self.receive()) is not None:
            yield message

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._ended:
            raise GrpcError(self.method, Status.CANCELLED, "the server ended the call")

    def _data(self, data: bytes, flow_bytes: int) -> int:
        before = len(self._messages)
        self._credit_bytes += flow_bytes
        try:
            self._messages.extend(self._decoder.feed(data))
        except GrpcError as error:
            self._fail(error)
        # Within a long message nobody is there to take: give the credit back
        # at once, the decoder's limit bounds the buffer.
        returned = 0
        if not self._messages:
            returned, self._credit_bytes = self._credit_bytes, 0
        self._changed.set()
        self._channel._messages += len(self._messages) - before
        return returned

    def _headers(self, headers: Sequence[tuple[str, str]]) -> None:
        error = status_of(self.method, headers)
        if error is not None:
            self._fail(error)

    def _end(self) -> None:
        if self._error is None:
            try:
                self._decoder.finish()
            except GrpcError as error:
                self._error = error
        self._ended = True
        self._wake()

    def _fail(self, error: GrpcError) -> None:
        if self._error is None:
            self._error = error
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._window.set()


@dataclass(slots=True, eq=False)
class Channel:
    """A connection to one gRPC server. Make it with `open_channel`."""

    stream: trio.abc.Stream
    authority: str
    scheme: str = "http"
    _h2: h2.connection.H2Connection = field(init=False)
    _calls: dict[int, Call] = field(init=False, default_factory=dict)
    _send_lock: trio.Lock = field(init=False, default_factory=trio.Lock)
    _broken: str | None = field(init=False, default=None)
    _opened: int = field(init=False, default=0)
    _messages: int = field(init=False, default=0)
    _bytes: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=True, header_encoding="utf-8")
        )
        self._h2.local_settings.initial_window_size = WINDOW_BYTES
        self._h2.local_settings.enable_push = 0

    @property
    def broken(self) -> bool:
        """No call can be made any more; open another channel."""
        return self._broken is not None

    def statistics(self) -> ChannelStatistics:
        """Counters since the channel was opened."""
        return ChannelStatistics(self._opened, len(self._calls), self._messages, self._bytes)

    @asynccontextmanager
    async def call(
        self, method: str, *, timeout_s: float = math.inf, metadata: Sequence[tuple[str, str]] = ()
    ) -> AsyncIterator[Call]:
        """Open a call; it is reset when the block is left before its end.

        Raises GrpcError: DEADLINE_EXCEEDED when `timeout_s` passes inside the
        block, UNAVAILABLE when the connection is broken.
        """
        if self._broken is not None:
            raise GrpcError(method, Status.UNAVAILABLE, self._broken)
        stream_id = self._h2.get_next_available_stream_id()
        call = Call(self, method, stream_id)
        finite = timeout_s if math.isfinite(timeout_s) else None
        self._h2.send_headers(
            stream_id,
            request_headers(
                method,
                self.authority,
                scheme=self.scheme,
                timeout_s=finite,
                metadata=metadata,
            ),
        )
        self._calls[stream_id] = call
        self._opened += 1
        try:
            with trio.move_on_after(timeout_s) as deadline:
                await self._flush()
                yield call
            if deadline.cancelled_caught:
                raise GrpcError(method, Status.DEADLINE_EXCEEDED, f"no answer in {timeout_s:g} s")
        finally:
            self._calls.pop(stream_id, None)
            if not call._ended and self._broken is None:
                self._reset(stream_id)
                # Another task's flush, or the next call's, carries it if we
                # are being cancelled.
                with trio.move_on_after(0.5, shield=True):
                    await self._flush()

    async def unary(
        self,
        method: str,
        request: bytes,
        *,
        timeout_s: float,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> bytes:
        """Send one message, take one message.

        Raises GrpcError when the call fails or answers with no message.
        """
        async with self.call(method, timeout_s=timeout_s, metadata=metadata) as call:
            await call.send(request, end=True)
            answer = await call.receive()
            if answer is None:
                raise GrpcError(method, Status.INTERNAL, "the server sent no message")
            # Trailers may still carry an error.
            await call.receive()
            return answer
        raise AssertionError("unreachable: the block returns or raises")

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Read the connection until it ends; run this in a nursery."""
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(WINDOW_BYTES)
        try:
            await self._flush()
            task_status.started()
            while self._broken is None:
                data = await self.stream.receive_some(READ_BYTES)
                if not data:
                    self._break("the server closed the connection")
                    break
                self._bytes += len(data)
                for event in self._h2.receive_data(data):
                    self._handle(event)
                await self._flush()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._break(f"the connection broke: {error}")
        except h2.exceptions.ProtocolError as error:
            self._break(f"the server broke HTTP/2: {error}")
        finally:
            self._break("the channel was closed")
            with trio.move_on_after(1, shield=True):
                await self.stream.aclose()

    def _handle(self, event: h2.events.Event) -> None:
        stream_id = getattr(event, "stream_id", None)
        call = self._calls.get(stream_id) if stream_id else None
        match event:
            case h2.events.DataReceived():
                size = event.flow_controlled_length or 0
                returned = call._data(event.data or b"", size) if call else size
                if returned and event.stream_id is not None:
                    self._acknowledge(event.stream_id, returned)
            case h2.events.ResponseReceived() | h2.events.TrailersReceived():
                if call and event.headers is not None:
                    call._headers([(_text(name), _text(value)) for name, value in event.headers])
            case h2.events.StreamEnded():
                if call:
                    call._end()
            case h2.events.StreamReset():
                if call:
                    code = event.error_code
                    call._fail(GrpcError(call.method, Status.UNAVAILABLE, f"stream reset ({code})"))
                    call._end()
            case h2.events.WindowUpdated() | h2.events.RemoteSettingsChanged():
                for waiting in self._calls.values():
                    waiting._window.set()
            case h2.events.ConnectionTerminated():
                self._break("the server is going away")

    def _acknowledge(self, stream_id: int, size: int) -> None:
        try:
            self._h2.acknowledge_received_data(size, stream_id)
        except h2.exceptions.StreamClosedError:
            # The call is over; the connection's share was given back by h2.
            return

    def _reset(self, stream_id: int) -> None:
        try:
            self._h2.reset_stream(stream_id, h2.errors.ErrorCodes.CANCEL)
        except (h2.exceptions.StreamClosedError, h2.exceptions.ProtocolError):
            # It ended while we were leaving: nothing to reset.
            return

    async def _give_back(self, stream_id: int, size: int) -> None:
        if size and self._broken is None:
            self._acknowledge(stream_id, size)
            await self._flush()

    async def _flush(self) -> None:
        async with self._send_lock:
            while data := self._h2.data_to_send():
                try:
                    await self.stream.send_all(data)
                except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    self._break(f"the connection broke: {error}")
                    return

    def _break(self, reason: str) -> None:
        if self._broken is None:
            self._broken = reason
        for call in self._calls.values():
            if not call._ended:
                call._fail(GrpcError(call.method, Status.UNAVAILABLE, self._broken))
                call._end()


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", "replace")


@asynccontextmanager
async def open_channel(
    stream: trio.abc.Stream, authority: str, *, scheme: str = "http"
) -> AsyncIterator[Channel]:
    """A channel over `stream`, closed with it when the block ends."""
    channel = Channel(stream, authority, scheme)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(channel.run)
            try:
                yield channel
            finally:
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # `run` ends with every fault of its own handled: what is in the group
        # is the block's one exception, and callers expect that one.
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from group.exceptions[0].__cause__
        raise
