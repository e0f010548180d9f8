"""HTTP/2 with a client: each request in a task of its own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import h2.errors
import trio

from meshbpf.agent.l7.message import Headers, RequestHead, ResponseHead
from meshbpf.agent.runtime.tasks import guarded
from meshbpf.agent.runtime.waypoint.channel import BrokenError, Channel
from meshbpf.agent.runtime.waypoint.http2 import HeaderList, Http2Connection, Http2Stream
from meshbpf.agent.runtime.waypoint.limits import Limits


class Http2Request:
    """One request. A `ClientRequest`."""

    upgrade = ""

    def __init__(self, stream: Http2Stream, headers: HeaderList) -> None:
        self._stream = stream
        pseudo: dict[bytes, bytes] = {}
        fields: HeaderList = []
        length: int | None = None
        for item in headers:
            name, value = item
            if name.startswith(b":"):
                pseudo[name] = value
            elif name == b"host":
                pseudo.setdefault(b":authority", value)
            else:
                if name == b"content-length" and value.isdigit():
                    length = int(value)
                fields.append(item)
        self.head = RequestHead(
            pseudo.get(b":method", b"").decode("latin-1"),
            pseudo.get(b":path", b"").decode("latin-1"),
            pseudo.get(b":authority", b"").decode("latin-1"),
            Headers(_joined_cookies(fields)),
        )
        self.has_body = not stream.over  # all of it may have come with the head
        self.body_bytes = length
        self.gone = False
        self.scope = trio.CancelScope()
        stream.on_gone = self.give_up

    def give_up(self) -> None:
        """See ClientRequest."""
        self.gone = True
        self.scope.cancel()

    @property
    def arrived(self) -> bool:
        """See ClientRequest."""
        return self._stream.ended

    @property
    def trailers(self) -> Headers | None:
        """See ClientRequest."""
        return self._stream.trailers

    async def read_body(self) -> bytes:
        """See ClientRequest."""
        return await self._stream.read_body()

    async def respond(self, head: ResponseHead, *, has_body: bool) -> None:
        """See ClientRequest."""
        stream, connection = self._stream, self._stream.connection
        if stream.failure:
            raise BrokenError(stream.failure)
        headers = [(b":status", b"%d" % head.status), *head.headers.raw]
        trailers = None if has_body else head.trailers
        alone = not (has_body or trailers)
        connection.call(connection.h2.send_headers, stream.id, headers, end_stream=alone)
        stream.local_ended = alone
        connection.answered()
        if trailers:
            await stream.end_body(trailers)
        else:
            await connection.flush()

    async def send_body(self, data: bytes) -> None:
        """See ClientRequest."""
        await self._stream.send_body(data)

    async def end_body(self, trailers: Headers | None) -> None:
        """See ClientRequest."""
        await self._stream.end_body(trailers)

    async def switch(self, head: ResponseHead) -> tuple[Channel, bytes]:
        """See ClientRequest. HTTP/2 has no 101."""
        raise BrokenError("HTTP/2 has no upgrade")

    def abort(self) -> None:
        """See ClientRequest."""
        self._stream.connection.reset(self._stream, h2.errors.ErrorCodes.INTERNAL_ERROR)

    async def finish(self) -> None:
        """Be done, whatever is left: a client that still sends is told to stop (RFC 9113, 8.1)."""
        stream = self._stream
        connection = stream.connection
        if stream.local_ended and not stream.ended:
            connection.reset(stream, h2.errors.ErrorCodes.NO_ERROR)
        elif not stream.local_ended:
            connection.reset(stream, h2.errors.ErrorCodes.INTERNAL_ERROR)
        connection.forget(stream)
        await connection.flush()


class Http2Server:
    """One connection."""

    def __init__(
        self, channel: Channel, handle: Callable[[Http2Request], Awaitable[None]], limits: Limits
    ) -> None:
        self._handle = handle
        self._connection = Http2Connection(channel, self, limits, client=False)
        self._nursery: trio.Nursery | None = None

    async def run(self, received: bytes = b"") -> None:
        """Serve the connection to its end; `received` was read from it already."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await self._connection.start()
            await self._connection.read(received)
            # Who asked has gone: nobody waits for what is still being made.
            nursery.cancel_scope.cancel()

    def on_request(self, stream: Http2Stream, headers: HeaderList) -> None:
        """A request has begun."""
        if self._nursery is not None:
            self._nursery.start_soon(guarded, self._one, stream, headers)

    def on_change(self) -> None:
        """Nothing depends on it here."""

    async def _one(self, stream: Http2Stream, headers: HeaderList) -> None:
        # StreamEnded is delivered with the same bytes as a head without a body.
        request = Http2Request(stream, headers)
        try:
            with request.scope:
                await self._handle(request)
        except BrokenError:
            return  # the client took it back, or is gone
        finally:
            with trio.CancelScope(shield=True):
                await request.finish()


def _joined_cookies(fields: HeaderList) -> HeaderList:
    """One cookie field, as HTTP/1.1 and every filter want it (RFC 9113, section 8.2.3)."""
    cookies = [value for name, value in fields if name == b"cookie"]
    if len(cookies) < 2:
        return fields
    rest = [each for each in fields if each[0] != b"cookie"]
    return [*rest, (b"cookie", b"; ".join(cookies))]
