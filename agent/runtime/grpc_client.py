"""A gRPC client for trio: one HTTP/2 connection, shared by its calls.

One task reads the connection and hands events to the calls, one writes what
h2 wants sent. Callers never touch the stream themselves: a call that is
cancelled while it sends would leave half a frame behind and with it a broken
connection for everybody.

Flow control is end to end: the window of a call is topped up only when its
consumer has taken the message, so a consumer that lags holds the server back
and memory stays bounded, by WINDOW_BYTES and one message a call. The window
of the connection is far larger, so that a call that lags holds up no other.

Cancellation: leaving a call early resets its stream (CANCEL); the connection
and the other calls go on. When the connection breaks every call ends with
UNAVAILABLE; when the server says goodbye (GOAWAY) the calls that it still
serves go on, and new ones end so.
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
import h2.settings
import trio

from meshbpf.agent.wire.grpc import (
    MAX_MESSAGE_BYTES,
    Decoder,
    GoAway,
    GoAwayFilter,
    GrpcError,
    Status,
    encode,
    request_headers,
    reset_error,
    status_of,
)

READ_BYTES = 64 * 1024
WINDOW_BYTES = 1024 * 1024
CONNECTION_WINDOW_BYTES = 16 * WINDOW_BYTES
_INITIAL_WINDOW_BYTES = 65_535  # RFC 9113, section 6.9.2: the connection's, no setting changes it
_MAX_HEADER_LIST_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Keepalive:
    """A PING when nothing came for `interval_s`; no answer in `timeout_s` ends the connection."""

    interval_s: float
    timeout_s: float


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """What a channel did since it was opened."""

    calls: int
    open_calls: int
    messages_received: int
    bytes_received: int


class Call:
    """One call of a Channel; made by `Channel.call`, used by one task."""

    def __init__(self, channel: Channel, method: str, stream_id: int) -> None:
        self._channel = channel
        self._stream_id = stream_id
        self.method = method
        self._decoder = Decoder(method, channel.max_message_bytes)
        self._messages: deque[bytes] = deque()
        self._credit_bytes = 0  # received, not yet given back to the server
        self._changed = trio.Event()
        self._window = trio.Event()
        self._error: GrpcError | None = None
        self._told = False  # the server said how the call went
        self._ended = False
        self._sent_end = False

    async def send(self, message: bytes, *, end: bool = False) -> None:
        """Send one message; waits while the server's window is closed.

        Raises GrpcError when the call has ended meanwhile. Cancelled halfway,
        the call is of no further use: leave its block.
        """
        view = memoryview(encode(message))
        h2c = self._channel._h2
        while view:
            self._check()
            room = min(h2c.local_flow_control_window(self._stream_id), h2c.max_outbound_frame_size)
            if room <= 0:
                self._window = trio.Event()
                await self._window.wait()
                continue
            part, view = view[:room], view[room:]
            self._sent_end = end and not view
            h2c.send_data(self._stream_id, bytes(part), end_stream=self._sent_end)
            await self._channel._written()

    async def receive(self) -> bytes | None:
        """The next message; None when the call ended with OK.

        Raises GrpcError when it ended otherwise.
        """
        await trio.lowlevel.checkpoint()
        while not self._messages:
            if self._error is not None:
                raise self._error
            if self._ended:
                return None
            self._changed = trio.Event()
            await self._changed.wait()
        message = self._messages.popleft()
        if not self._messages:
            self._channel._acknowledge(self._stream_id, self._take_credit())
        return message

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> bytes:
        message = await self.receive()
        if message is None:
            raise StopAsyncIteration
        return message

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._ended:
            raise GrpcError(self.method, Status.CANCELLED, "the server ended the call")

    def _take_credit(self) -> int:
        credit, self._credit_bytes = self._credit_bytes, 0
        return credit

    def _data(self, data: bytes, flow_bytes: int) -> int:
        """Take a DATA frame; returns how much of it the server may send anew at once."""
        if self._error is not None:
            return flow_bytes  # nobody reads on, and nothing is kept
        self._credit_bytes += flow_bytes
        try:
            for message in self._decoder.feed(data):
                self._messages.append(message)
                self._channel._messages += 1
        except GrpcError as error:
            self._fail(error)
        self._changed.set()
        # Within a long message nobody is there to take: give the credit back
        # at once, the decoder's limit bounds the buffer.
        return 0 if self._messages else self._take_credit()

    def _headers(self, headers: Sequence[tuple[str, str]]) -> None:
        status = status_of(self.method, headers)
        if isinstance(status, GrpcError):
            self._fail(status)
        elif status is not None:
            self._told = True

    def _end(self) -> None:
        if self._error is None and not self._ended:
            try:
                self._decoder.finish()
            except GrpcError as error:
                self._error = error
            else:
                if not self._told:
                    what = "the server ended the call without a status"
                    self._error = GrpcError(self.method, Status.INTERNAL, what)
        self._ended = True
        self._wake()

    def _fail(self, error: GrpcError) -> None:
        # After its end a call is as it ended: a server may still reset the
        # stream because it does not want the rest of the request.
        if self._error is None and not self._ended:
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
    max_message_bytes: int = MAX_MESSAGE_BYTES
    keepalive: Keepalive | None = None
    _h2: h2.connection.H2Connection = field(init=False)
    _goaways: GoAwayFilter = field(init=False, default_factory=GoAwayFilter)
    _calls: dict[int, Call] = field(init=False, default_factory=dict)
    _pending: trio.Event = field(init=False, default_factory=trio.Event)
    _drained: trio.Event = field(init=False, default_factory=trio.Event)
    _slot: trio.Event = field(init=False, default_factory=trio.Event)
    _broken: str | None = field(init=False, default=None)
    """Why no new call can be made."""
    _ended: bool = field(init=False, default=False)
    """Nothing comes or goes any more."""
    _opened: int = field(init=False, default=0)
    _messages: int = field(init=False, default=0)
    _bytes: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        # Header encoding None: bytes, for a peer's bad UTF-8 is no reason to
        # lose the connection.
        self._h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=True, header_encoding=None)
        )
        codes = h2.settings.SettingCodes
        # As initial values: those set one by one count only once the server
        # has acknowledged them, which h2 then remembers wrongly.
        self._h2.local_settings = h2.settings.Settings(
            client=True,
            initial_values={
                codes.ENABLE_PUSH: 0,
                codes.INITIAL_WINDOW_SIZE: WINDOW_BYTES,
                codes.MAX_HEADER_LIST_SIZE: _MAX_HEADER_LIST_BYTES,
            },
        )

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
        call: Call | None = None
        headers = request_headers(
            method,
            self.authority,
            scheme=self.scheme,
            timeout_s=timeout_s if math.isfinite(timeout_s) else None,
            metadata=metadata,
        )
        try:
            with trio.move_on_after(timeout_s) as deadline:
                await self._free_slot(method)
                call = self._open(method, headers)
                await self._written()
                yield call
            if deadline.cancelled_caught:
                raise GrpcError(method, Status.DEADLINE_EXCEEDED, f"no answer in {timeout_s:g} s")
        finally:
            if call is not None:
                self._leave(call)

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
            if await call.receive() is not None:
                raise GrpcError(method, Status.INTERNAL, "the server sent a second message")
            return answer
        raise AssertionError("unreachable: the block returns or raises")

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry the connection until it ends; run this in a nursery."""
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(CONNECTION_WINDOW_BYTES - _INITIAL_WINDOW_BYTES)
        self._pending.set()
        task_status.started()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, nursery.cancel_scope)
                if self.keepalive is not None:
                    nursery.start_soon(self._ping, self.keepalive, nursery.cancel_scope)
                await self._read()
                nursery.cancel_scope.cancel()
        finally:
            self._break("the channel was closed")
            await trio.aclose_forcefully(self.stream)

    async def _read(self) -> None:
        try:
            while True:
                data = await self.stream.receive_some(READ_BYTES)
                if not data:
                    self._break("the server closed the connection")
                    return
                self._bytes += len(data)
                for part in self._goaways.feed(bytes(data)):
                    if isinstance(part, GoAway):
                        self._going_away(part)
                    else:
                        for event in self._h2.receive_data(part):
                            self._handle(event)
                self._pending.set()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._break(f"the connection broke: {error}")
        except h2.exceptions.ProtocolError as error:
            self._break(f"the server broke HTTP/2: {error}")

    async def _ping(self, every: Keepalive, scope: trio.CancelScope) -> None:
        while True:
            seen = self._bytes
            await trio.sleep(every.interval_s)
            if self._bytes != seen:
                continue
            try:
                self._h2.ping(b"meshbpf\0")
            except h2.exceptions.ProtocolError:
                return  # the connection is over; the reader says why
            self._pending.set()
            await trio.sleep(every.timeout_s)
            # Whatever arrived meanwhile is as good a sign of life as the answer.
            if self._bytes == seen:
                self._break(f"the server answered no PING in {every.timeout_s:g} s")
                scope.cancel()
                return

    async def _write(self, scope: trio.CancelScope) -> None:
        try:
            while True:
                if data := self._h2.data_to_send():
                    await self.stream.send_all(data)
                else:
                    self._drained.set()
                    self._pending = trio.Event()
                    await self._pending.wait()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._break(f"the connection broke: {error}")
            scope.cancel()

    async def _written(self) -> None:
        """Wait until all that was queued so far is on its way."""
        if self._drained.is_set() and not self._ended:
            self._drained = trio.Event()
        self._pending.set()
        await self._drained.wait()

    async def _free_slot(self, method: str) -> None:
        """Wait until the server's limit allows one more stream."""
        while self._broken is None:
            if self._h2.open_outbound_streams < self._h2.remote_settings.max_concurrent_streams:
                return
            if self._slot.is_set():
                self._slot = trio.Event()
            await self._slot.wait()
        raise GrpcError(method, Status.UNAVAILABLE, self._broken)

    def _open(self, method: str, headers: Sequence[tuple[str, str]]) -> Call:
        stream_id = self._h2.get_next_available_stream_id()
        call = Call(self, method, stream_id)
        self._h2.send_headers(stream_id, headers)
        self._calls[stream_id] = call
        self._opened += 1
        return call

    def _leave(self, call: Call) -> None:
        self._calls.pop(call._stream_id, None)
        if not (call._ended and call._sent_end):
            self._reset(call._stream_id)
        # What was received and never taken still counts against the connection.
        self._acknowledge(call._stream_id, call._take_credit())
        self._slot.set()
        self._pending.set()

    def _handle(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.DataReceived():
                size = event.flow_controlled_length or 0
                call = self._calls.get(event.stream_id or 0)
                returned = call._data(event.data or b"", size) if call else size
                self._acknowledge(event.stream_id or 0, returned)
            case h2.events.ResponseReceived() | h2.events.TrailersReceived():
                if call := self._calls.get(event.stream_id or 0):
                    call._headers(
                        [(_text(name), _text(value)) for name, value in event.headers or ()]
                    )
            case h2.events.StreamEnded():
                if call := self._calls.get(event.stream_id or 0):
                    call._end()
            case h2.events.StreamReset():
                if call := self._calls.get(event.stream_id or 0):
                    call._fail(reset_error(call.method, int(event.error_code or 0)))
                    call._end()
                self._slot.set()
            case h2.events.WindowUpdated() | h2.events.RemoteSettingsChanged():
                self._slot.set()
                for waiting in self._calls.values():
                    waiting._window.set()

    def _going_away(self, goaway: GoAway) -> None:
        if self._broken is None:
            self._broken = goaway.reason
        self._slot.set()
        for call in list(self._calls.values()):
            if call._stream_id > goaway.last_stream_id:
                call._fail(GrpcError(call.method, Status.UNAVAILABLE, goaway.reason))
                call._end()

    def _acknowledge(self, stream_id: int, size: int) -> None:
        if not size:
            return
        try:
            self._h2.acknowledge_received_data(size, stream_id)
        except h2.exceptions.ProtocolError:
            return  # the connection is over, and with it all windows
        self._pending.set()

    def _reset(self, stream_id: int) -> None:
        try:
            self._h2.reset_stream(stream_id, h2.errors.ErrorCodes.CANCEL)
        except h2.exceptions.ProtocolError:
            return  # it ended while we were leaving, or the connection did

    def _break(self, reason: str) -> None:
        """Nothing comes any more: end every call that waits."""
        if self._broken is None:
            self._broken = reason
        self._ended = True
        for call in self._calls.values():
            if not call._ended:
                call._fail(GrpcError(call.method, Status.UNAVAILABLE, self._broken))
                call._end()
        self._drained.set()
        self._slot.set()


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", "replace")


@asynccontextmanager
async def open_channel(
    stream: trio.abc.Stream,
    authority: str,
    *,
    scheme: str = "http",
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    keepalive: Keepalive | None = None,
) -> AsyncIterator[Channel]:
    """A channel over `stream`, closed with it when the block ends."""
    channel = Channel(stream, authority, scheme, max_message_bytes, keepalive)
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
        # Cancelled while the call failed: who cancels does not ask how it went.
        cancelled, rest = group.split(trio.Cancelled)
        if cancelled is not None and rest is not None and rest.split(GrpcError)[1] is None:
            raise cancelled from None
        raise
