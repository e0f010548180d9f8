"""HTTP/2 over a channel, by the h2 library: what both ends of it share.

One task reads and feeds h2; every other task that has something to say calls
h2 and then `flush`. Whoever flushes first sends for all; the others' words go
with its next round, so the bytes keep the order in which h2 made them. What a
stream may send is bounded by the peer's windows, what it may receive by ours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import trio

from meshbpf.agent.l7.message import Headers, RawHeaders
from meshbpf.agent.runtime.waypoint.channel import BrokenError, Channel, Waiter
from meshbpf.agent.runtime.waypoint.limits import Limits
from meshbpf.agent.runtime.waypoint.message import FaultyPeerError

STREAM_WINDOW_BYTES = 256 * 1024
CONNECTION_WINDOW_BYTES = 4 * 1024 * 1024
_DEFAULT_WINDOW_BYTES = 65535
_REFUSED = h2.errors.ErrorCodes.REFUSED_STREAM

HeaderList = list[tuple[bytes, bytes]]


class Http2Stream:
    """One request of a connection: what has arrived for it, and its waits."""

    def __init__(self, connection: Http2Connection, stream_id: int) -> None:
        self.id = stream_id
        self.connection = connection
        self.trailers: Headers | None = None
        self.headers: HeaderList | None = None
        """The answer's, on a client's stream."""
        self.ended = False
        """The peer sends no more."""
        self.failure = ""
        self.refused = False
        """The peer says that it has not looked at it."""
        self.local_ended = False
        self.on_gone: Callable[[], None] | None = None
        """Called when the stream fails."""
        self._data: deque[tuple[bytes, int]] = deque()
        self._reader = Waiter()
        self._window = Waiter()

    @property
    def over(self) -> bool:
        """Nothing more is to be read, trailers included."""
        return self.ended and not self._data and not self.trailers

    async def wait_headers(self) -> HeaderList:
        """A client's: the final answer's fields."""
        while self.headers is None:
            if self.failure:
                raise BrokenError(self.failure)
            if self.ended:
                raise FaultyPeerError("the stream ended without an answer", 502)
            await self._reader.wait()
        return self.headers

    async def read_body(self) -> bytes:
        """Some of the body; b"" at its end. The peer may send as much again."""
        while not self._data:
            if self.failure:
                raise BrokenError(self.failure)
            if self.ended:
                return b""
            await self._reader.wait()
        if len(self._data) == 1:
            data, taken = self._data.popleft()
        else:
            data = b"".join(piece for piece, _ in self._data)
            taken = sum(size for _, size in self._data)
            self._data.clear()
        await self.connection.credit(self.id, taken)
        return data

    async def send_body(self, data: bytes | memoryview) -> None:
        """Send all of it, as the peer's windows allow."""
        connection = self.connection
        while data:
            if self.failure:
                raise BrokenError(self.failure)
            budget = connection.budget(self.id)
            if budget <= 0:
                connection.blocked[self.id] = self
                await self._window.wait()
                continue
            if budget >= len(data):
                piece, data = data, b""
            else:
                view = memoryview(data)
                piece, data = view[:budget], view[budget:]
            connection.call(connection.h2.send_data, self.id, bytes(piece))
            await connection.flush()

    async def end_body(self, trailers: Headers | None) -> None:
        """Send no more."""
        if self.local_ended or self.failure:
            return
        self.local_ended = True
        connection = self.connection
        if trailers is not None and len(trailers):
            connection.call(connection.h2.send_headers, self.id, trailers.raw, end_stream=True)
        else:
            connection.call(connection.h2.end_stream, self.id)
        await connection.flush()

    # --- the connection's side --------------------------------------------------

    def on_data(self, data: bytes, size: int) -> None:
        """Keep it; `size` counts padding too."""
        self._data.append((data, size))
        self._reader.wake()

    def on_headers(self, headers: HeaderList) -> None:
        """The answer's fields have come."""
        self.headers = headers
        self._reader.wake()

    def on_end(self) -> None:
        """The peer sends no more."""
        self.ended = True
        self._reader.wake()

    def on_failure(self, reason: str, *, refused: bool = False) -> None:
        """It is gone."""
        if not self.failure:
            self.failure = reason
            self.refused = refused
            if self.on_gone is not None:
                self.on_gone()
        self._reader.wake()
        self._window.wake()

    def on_window(self) -> None:
        """More may be sent, perhaps."""
        self._window.wake()


class Owner(Protocol):
    """Who acts on what only one of the ends can receive."""

    def on_request(self, stream: Http2Stream, headers: HeaderList) -> None:
        """Server: a request has begun."""
        ...

    def on_change(self) -> None:
        """A stream has ended, or the peer's settings or willingness have changed."""
        ...


class Http2Connection:
    """Either end."""

    def __init__(self, channel: Channel, owner: Owner, limits: Limits, *, client: bool) -> None:
        self.channel = channel
        self.h2 = _machine(limits, client=client)
        self.streams: dict[int, Http2Stream] = {}
        self.blocked: dict[int, Http2Stream] = {}
        """Streams that wait for a window."""
        self.going_away = False
        self.closed = ""
        """Why it is over; empty while it is not."""
        self._owner = owner
        self._sending = False
        self._resets = 0
        self._resets_limit = limits.h2_resets
        self._client = client

    async def start(self) -> None:
        """Say our part of the preface."""
        self.h2.initiate_connection()
        self.h2.increment_flow_control_window(CONNECTION_WINDOW_BYTES - _DEFAULT_WINDOW_BYTES)
        await self.flush()

    async def read(self, received: bytes = b"") -> None:
        """Feed h2 until the peer ends, breaks the rules, or the channel breaks."""
        reason = "the peer closed the connection"
        try:
            while True:
                data = received or await self.channel.receive()
                received = b""
                if not data:
                    break
                for event in self.h2.receive_data(data):
                    self._on_event(event)
                await self.flush()
        except h2.exceptions.ProtocolError as error:
            reason = f"HTTP/2: {error}"
            await self.flush()  # h2 has written the GOAWAY
        except FaultyPeerError as error:
            reason = error.what
            self.call(self.h2.close_connection, h2.errors.ErrorCodes.ENHANCE_YOUR_CALM)
            await self.flush()
        except BrokenError as error:
            reason = error.what
        finally:
            self.close(reason)

    def close(self, reason: str) -> None:
        """End it and all its streams."""
        if self.closed:
            return
        self.closed = reason
        self.going_away = True
        self.channel.close()
        for stream in list(self.streams.values()):
            stream.on_failure(reason)
        self.streams.clear()
        self._owner.on_change()

    def call(self, what: object, *arguments: object, **named: object) -> None:
        """Call h2; BrokenError when the stream or the connection no longer takes it."""
        assert callable(what)  # noqa: S101 (for the type checker)
        try:
            what(*arguments, **named)
        except (h2.exceptions.ProtocolError, KeyError) as error:
            raise BrokenError(f"HTTP/2: {error}") from error

    def budget(self, stream_id: int) -> int:
        """How much of a body may be sent in one frame now."""
        try:
            window = self.h2.local_flow_control_window(stream_id)
        except h2.exceptions.ProtocolError as error:
            raise BrokenError(f"HTTP/2: {error}") from error
        return min(window, self.h2.max_outbound_frame_size)

    async def credit(self, stream_id: int, size: int) -> None:
        """`size` bytes are done with."""
        if self.closed:
            return
        try:
            self.h2.acknowledge_received_data(size, stream_id)
        except h2.exceptions.ProtocolError:
            return  # the stream is over, and its bytes with it
        await self.flush()

    async def flush(self) -> None:
        """Send what h2 has to say, unless somebody is at it."""
        if self._sending or self.closed:
            return
        data = self.h2.data_to_send()
        if not data:
            return
        self._sending = True
        try:
            # A frame that is cut in the middle would break the connection for all.
            with trio.CancelScope(shield=True):
                while data:
                    await self.channel.send(data)
                    data = self.h2.data_to_send()
        except BrokenError as error:
            self.close(error.what)
        finally:
            self._sending = False

    def reset(self, stream: Http2Stream, code: h2.errors.ErrorCodes) -> None:
        """End a stream in both directions; flush afterwards."""
        if stream.id in self.streams and not self.closed:
            self.forget(stream)
            try:
                self.h2.reset_stream(stream.id, code)
            except h2.exceptions.ProtocolError:
                return  # it was over already

    def forget(self, stream: Http2Stream) -> None:
        """Nothing more is expected of it."""
        self.blocked.pop(stream.id, None)
        if self.streams.pop(stream.id, None) is not None:
            self._owner.on_change()

    # --- events -----------------------------------------------------------------

    def _on_event(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.DataReceived():
                self._on_data(event)
            case h2.events.RequestReceived():
                stream = Http2Stream(self, _id(event.stream_id))
                self.streams[stream.id] = stream
                self._owner.on_request(stream, _fields(event.headers))
            case h2.events.ResponseReceived():
                if (answered := self._stream(event.stream_id)) is not None:
                    answered.on_headers(_fields(event.headers))
            case h2.events.TrailersReceived():
                if (trailing := self._stream(event.stream_id)) is not None:
                    trailing.trailers = Headers(_fields(event.headers))
            case h2.events.StreamEnded():
                if (ended := self._stream(event.stream_id)) is not None:
                    ended.on_end()
            case h2.events.StreamReset():
                self._on_reset(event)
            case h2.events.WindowUpdated():
                self._on_window(event.stream_id or 0)
            case h2.events.RemoteSettingsChanged():
                self._on_window(0)
                self._owner.on_change()
            case h2.events.ConnectionTerminated():
                self._on_goaway(event)
            case _:
                pass  # PING and SETTINGS are answered by h2; 1xx answers are dropped

    def _stream(self, stream_id: int | None) -> Http2Stream | None:
        return self.streams.get(_id(stream_id))

    def _on_data(self, event: h2.events.DataReceived) -> None:
        size = event.flow_controlled_length or 0
        stream = self._stream(event.stream_id)
        if stream is not None:
            stream.on_data(bytes(event.data or b""), size)
        elif size:
            try:
                self.h2.acknowledge_received_data(size, _id(event.stream_id))
            except h2.exceptions.ProtocolError:
                return  # the stream is over

    def _on_reset(self, event: h2.events.StreamReset) -> None:
        stream = self._stream(event.stream_id)
        if not self._client:
            self._resets += 1
            if self._resets > self._resets_limit:
                raise FaultyPeerError(
                    "the client takes back more requests than it lets be answered"
                )
        if stream is None:
            return
        self.forget(stream)
        code = event.error_code
        name = getattr(code, "name", str(code))
        stream.on_failure(f"the peer reset the stream ({name})", refused=code == _REFUSED)

    def answered(self) -> None:
        """A request was let be answered: resets are forgiven one by one."""
        self._resets = max(self._resets - 1, 0)

    def _on_window(self, stream_id: int) -> None:
        waiting = (
            list(self.blocked.values())
            if not stream_id
            else [each for each in (self.blocked.get(stream_id),) if each is not None]
        )
        for stream in waiting:
            del self.blocked[stream.id]
            stream.on_window()

    def _on_goaway(self, event: h2.events.ConnectionTerminated) -> None:
        self.going_away = True
        last = event.last_stream_id or 0
        for stream in [each for each in self.streams.values() if each.id > last]:
            if self._client:
                self.forget(stream)
                stream.on_failure("the peer goes away", refused=True)
        self._owner.on_change()


def _machine(limits: Limits, *, client: bool) -> h2.connection.H2Connection:
    config = h2.config.H2Configuration(client_side=client, header_encoding=None)
    machine = h2.connection.H2Connection(config)
    codes = h2.settings.SettingCodes
    values: dict[h2.settings.SettingCodes, int] = {
        codes.INITIAL_WINDOW_SIZE: STREAM_WINDOW_BYTES,
        codes.MAX_HEADER_LIST_SIZE: limits.head_bytes,
        codes.ENABLE_PUSH: 0,
    }
    if not client:
        values[codes.MAX_CONCURRENT_STREAMS] = limits.h2_streams
    machine.local_settings = h2.settings.Settings(client=client, initial_values=values)
    machine.decoder.max_header_list_size = limits.head_bytes
    return machine


def _id(stream_id: int | None) -> int:
    return stream_id or 0


def _fields(headers: object) -> RawHeaders:
    found: RawHeaders = headers if isinstance(headers, list) else []
    return [(bytes(name), bytes(value)) for name, value in found]
