"""HTTP/2 with an endpoint: many requests share one connection."""

from __future__ import annotations

from collections.abc import Callable

import h2.errors
import h2.exceptions
import trio

from meshbpf.agent.l7.message import Headers, RequestHead, ResponseHead
from meshbpf.agent.runtime.tasks import guarded
from meshbpf.agent.runtime.waypoint.channel import BrokenError, Channel
from meshbpf.agent.runtime.waypoint.http2 import HeaderList, Http2Connection, Http2Stream
from meshbpf.agent.runtime.waypoint.limits import Limits
from meshbpf.agent.runtime.waypoint.message import FaultyPeerError, UnsentError


class Http2Upstream:
    """One request. An `UpstreamRequest`."""

    def __init__(self, client: Http2Client) -> None:
        self._client = client
        self._begun: Http2Stream | None = None
        self._tried = self._released = False

    @property
    def _stream(self) -> Http2Stream:
        if self._begun is None:
            raise BrokenError("the request has not begun")
        return self._begun

    @property
    def trailers(self) -> Headers | None:
        """Of the answer."""
        return self._stream.trailers

    @property
    def empty(self) -> bool:
        """See UpstreamRequest."""
        return self._stream.over

    @property
    def replayable(self) -> bool:
        """See UpstreamRequest."""
        return False

    async def send_head(self, head: RequestHead, *, has_body: bool, upgrade: str) -> None:
        """See UpstreamRequest."""
        if upgrade:
            raise FaultyPeerError("HTTP/2 has no upgrade", 501)
        connection = self._client.connection
        headers = [
            (b":method", head.method.encode("latin-1")),
            (b":scheme", head.scheme.encode("latin-1")),
            (b":authority", head.authority.encode("latin-1")),
            (b":path", head.path.encode("latin-1")),
            *head.headers.raw,
        ]
        self._tried = True
        self._begun = self._client.begin(headers, has_body=has_body)
        await connection.flush()

    async def send_body(self, data: bytes) -> None:
        """See UpstreamRequest."""
        await self._stream.send_body(data)

    async def end_body(self, trailers: Headers | None) -> None:
        """See UpstreamRequest."""
        await self._stream.end_body(trailers)

    async def read_head(self) -> ResponseHead:
        """See UpstreamRequest."""
        stream = self._stream
        try:
            headers = await stream.wait_headers()
        except BrokenError as error:
            if stream.refused:
                raise UnsentError("refused-stream", error.what) from error
            raise
        return _response(headers)

    async def read_body(self) -> bytes:
        """See UpstreamRequest."""
        return await self._stream.read_body()

    def switch(self) -> tuple[Channel, bytes]:
        """See UpstreamRequest."""
        raise BrokenError("HTTP/2 has no upgrade")

    def release(self) -> None:
        """See UpstreamRequest."""
        if self._released:
            return
        self._released = True
        stream, connection = self._begun, self._client.connection
        if stream is None:
            if not self._tried:
                self._client.give_back()
            return
        if not (stream.ended and stream.local_ended):
            connection.reset(stream, h2.errors.ErrorCodes.CANCEL)
        connection.forget(stream)
        self._client.flush_soon()


class Http2Client:
    """One connection to an endpoint."""

    def __init__(self, channel: Channel, limits: Limits, nursery: trio.Nursery) -> None:
        self.connection = Http2Connection(channel, self, limits, client=True)
        self.on_change_call: Callable[[], None] | None = None
        self.draining = False
        """Take no other request: its endpoint is gone."""
        self.idle_since_s = 0.0
        self._limit = limits.h2_streams
        self._reserved = 0
        """Requests that are opened and not begun."""
        self._nursery = nursery

    async def start(self) -> None:
        """Begin, and read in the background from now on."""
        await self.connection.start()
        self._nursery.start_soon(guarded, self.connection.read)

    @property
    def free(self) -> bool:
        """Whether it takes one more request."""
        connection = self.connection
        if connection.closed or connection.going_away or self.draining:
            return False
        limit = min(self._limit, connection.h2.remote_settings.max_concurrent_streams)
        return len(connection.streams) + self._reserved < limit

    @property
    def over(self) -> bool:
        """Nothing will come of it any more."""
        connection = self.connection
        return bool(connection.closed)

    def open(self) -> Http2Upstream:
        """One more request; ask `free` first."""
        self._reserved += 1
        return Http2Upstream(self)

    def give_back(self) -> None:
        """A request that was opened is not made."""
        self._reserved -= 1
        self.on_change()

    def begin(self, headers: HeaderList, *, has_body: bool) -> Http2Stream:
        """Send a head. Stream ids are in the order of heads, so nothing waits in between."""
        machine = self.connection.h2
        try:
            stream_id = machine.get_next_available_stream_id()
            machine.send_headers(stream_id, headers, end_stream=not has_body)
        except h2.exceptions.NoAvailableStreamIDError as error:
            self.connection.going_away = True
            raise UnsentError("no-stream-id", str(error)) from error
        except h2.exceptions.ProtocolError as error:
            raise UnsentError("not-sent", f"HTTP/2: {error}") from error
        finally:
            self._reserved -= 1
        stream = Http2Stream(self.connection, stream_id)
        stream.local_ended = not has_body
        self.connection.streams[stream_id] = stream
        return stream

    def drain(self) -> None:
        """End with the requests that are in flight."""
        self.draining = True
        if not (self.connection.streams or self._reserved):
            self.connection.close("its endpoint is gone")

    def flush_soon(self) -> None:
        """Send what h2 has to say, from somewhere that cannot wait."""
        if not self.connection.closed:
            self._nursery.start_soon(guarded, self.connection.flush)

    def on_request(self, stream: Http2Stream, headers: HeaderList) -> None:
        """Endpoints ask nothing: push is off."""

    def on_change(self) -> None:
        """A stream has ended, or the connection has."""
        connection = self.connection
        if not (connection.streams or self._reserved):
            self.idle_since_s = trio.current_time()
            if (self.draining or connection.going_away) and not connection.closed:
                connection.close("it drained")
        if self.on_change_call is not None:
            self.on_change_call()


def _response(headers: HeaderList) -> ResponseHead:
    status = 0
    fields: HeaderList = []
    for name, value in headers:
        if name == b":status":
            status = int(value) if value.isdigit() else 0
        elif not name.startswith(b":"):
            fields.append((name, value))
    if not 200 <= status <= 599:
        raise FaultyPeerError(f"the endpoint answered with status {status}", 502)
    return ResponseHead(status, Headers(fields))
