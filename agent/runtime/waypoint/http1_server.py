"""HTTP/1.1 with a client, over h11: one request after the other."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from http import HTTPStatus

import h11
import trio

from meshbpf.agent.l7.message import Headers, RequestHead, ResponseHead
from meshbpf.agent.runtime.waypoint.channel import BrokenError, Channel
from meshbpf.agent.runtime.waypoint.h11_headers import checked
from meshbpf.agent.runtime.waypoint.limits import Limits
from meshbpf.agent.runtime.waypoint.message import FaultyPeerError, without_hops

_DRAIN_BYTES = 256 * 1024
"""A body that nobody wanted is read up to here, so that the connection can go on."""
_REASONS = {each.value: each.phrase.encode() for each in HTTPStatus}
_SWITCHING = 101


class Http1Request:
    """One request. A `ClientRequest`."""

    def __init__(self, server: Http1Server, event: h11.Request) -> None:
        self._server = server
        authority = b""
        length: int | None = None
        chunked = False
        self.upgrade = ""
        hops = False
        kept: list[tuple[bytes, bytes]] = []
        for item in event.headers:
            name, value = item
            if name == b"host":
                authority = value
                continue
            if name == b"content-length":
                length = int(value)
            elif name == b"transfer-encoding":
                chunked = hops = True
            elif name == b"upgrade":
                self.upgrade = value.decode("latin-1").lower()
                hops = True
            elif name in (b"connection", b"keep-alive", b"te", b"proxy-connection"):
                hops = True
            kept.append(item)
        target = event.target
        if not target.startswith(b"/"):
            target, authority = _absolute(target, authority)
        self.head = RequestHead(
            event.method.decode("ascii"),
            target.decode("latin-1"),
            authority.decode("latin-1"),
            Headers(without_hops(kept) if hops else kept),
        )
        self.has_body = chunked or bool(length)
        self.body_bytes = None if chunked else length or 0
        self.trailers: Headers | None = None
        self.answered = False
        self.aborted = False
        self.gone = False
        self._body_over = False

    @property
    def arrived(self) -> bool:
        """See ClientRequest."""
        return self._body_over

    def give_up(self) -> None:
        """See ClientRequest."""
        self.gone = True
        self._server.scope.cancel()

    async def read_body(self) -> bytes:
        """See ClientRequest."""
        while not self._body_over:
            event = await self._server.next_event()
            if isinstance(event, h11.Data):
                if event.data:
                    return bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                self._body_over = True
                if event.headers:
                    self.trailers = Headers(event.headers)
            else:
                raise BrokenError("the client has gone")
        return b""

    async def respond(self, head: ResponseHead, *, has_body: bool) -> None:
        """See ClientRequest."""
        self.answered = True
        headers = head.headers.raw
        if not has_body and self.head.method != "HEAD" and head.status not in (204, 304):
            headers = [each for each in headers if each[0] != b"content-length"]
            headers.append((b"content-length", b"0"))
        if self._server.closing:
            headers = [*headers, (b"connection", b"close")]
        event = h11.Response(
            status_code=head.status,
            headers=checked(headers),
            reason=_REASONS.get(head.status, b""),
        )
        data = self._server.serialize(event)
        if not has_body:
            data += self._server.serialize(h11.EndOfMessage())
        await self._server.channel.send(data)

    async def send_body(self, data: bytes) -> None:
        """See ClientRequest."""
        await self._server.channel.send(self._server.serialize(h11.Data(data=data)))

    async def end_body(self, trailers: Headers | None) -> None:
        """See ClientRequest."""
        event = h11.EndOfMessage(headers=trailers.raw if trailers and self._server.chunked else [])
        data = self._server.serialize(event)
        if data:
            await self._server.channel.send(data)

    async def switch(self, head: ResponseHead) -> tuple[Channel, bytes]:
        """See ClientRequest."""
        self.answered = True
        headers = [
            *without_hops(head.headers.raw),
            (b"connection", b"Upgrade"),
            (b"upgrade", self.upgrade.encode("latin-1")),
        ]
        event = h11.InformationalResponse(
            status_code=_SWITCHING, headers=headers, reason=_REASONS[_SWITCHING]
        )
        await self._server.channel.send(self._server.serialize(event))
        self._server.switched = True
        return self._server.channel, self._server.trailing()

    def abort(self) -> None:
        """See ClientRequest: a body that ends too early, on a connection that is reset."""
        self.aborted = True
        self._server.channel.close()

    async def finish(self) -> bool:
        """Read what is left of the body; whether the connection can take another request."""
        left = _DRAIN_BYTES
        while self.answered and not (self._body_over or self.aborted) and left > 0:
            data = await self.read_body()
            if not data:
                break
            left -= len(data)
        return left > 0 and not self.aborted


class Http1Server:
    """One connection."""

    def __init__(
        self, channel: Channel, handle: Callable[[Http1Request], Awaitable[None]], limits: Limits
    ) -> None:
        self.channel = channel
        self.closing = False
        """Say `connection: close` with the next answer."""
        self.switched = False
        self.scope = trio.CancelScope()
        """Of the whole connection: one for each request would cost it a tenth of its time."""
        self._handle = handle
        self._limits = limits
        self._fault: h11.RemoteProtocolError | None = None
        """What was wrong with a client's body."""
        self._begun = False
        """Some of a head has come, and not all."""
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.head_bytes)

    @property
    def chunked(self) -> bool:
        """The answer that is being sent may have trailers."""
        return self._h11.their_http_version == b"1.1"

    def serialize(self, event: h11.Event) -> bytes:
        """What to send for an event. FaultyPeerError for what would be no HTTP."""
        try:
            return self._h11.send(event) or b""
        except h11.LocalProtocolError as error:
            raise FaultyPeerError(f"the answer cannot be said in HTTP/1.1: {error}", 502) from error

    def trailing(self) -> bytes:
        """What was received beyond the message."""
        return self._h11.trailing_data[0]

    async def run(self, received: bytes = b"") -> None:
        """Serve the connection to its end; `received` was read from it already."""
        try:
            if received:
                self._h11.receive_data(received)
            with self.scope:
                while await self._one(bool(received)):
                    received = b""
            if self._fault is not None:
                raise self._fault
            if self.scope.cancelled_caught and self._begun:
                raise FaultyPeerError("the request's head is not complete", 408)
        except BrokenError:
            return
        except (h11.RemoteProtocolError, FaultyPeerError) as error:
            await self._refuse(error)
        finally:
            if not self.switched:
                self.channel.close()

    async def next_event(self) -> object:
        """The next event of a body that is no hunger. BrokenError, also for what is no HTTP."""
        http = self._h11
        try:
            while (event := http.next_event()) is h11.NEED_DATA:
                if http.they_are_waiting_for_100_continue:
                    told = h11.InformationalResponse(
                        status_code=100, headers=[], reason=b"Continue"
                    )
                    await self.channel.send(http.send(told) or b"")
                http.receive_data(await self.channel.receive())
        except h11.RemoteProtocolError as error:
            self._fault = error
            raise BrokenError(f"the client's body is no HTTP: {error}") from error
        return event

    async def _one(self, begun: bool) -> bool:
        """Serve one request; False when there will be no other."""
        event = await self._next_head(begun)
        if event is None:
            return False
        request = Http1Request(self, event)
        self.channel.watch_broken(request.give_up)
        try:
            await self._handle(request)
        finally:
            self.channel.watch_broken(None)
        if self.switched or self._fault or not await request.finish():
            return False
        http = self._h11
        if http.our_state is h11.DONE and http.their_state is h11.DONE:
            http.start_next_cycle()
            return not self.closing
        if http.our_state is h11.MUST_CLOSE:
            await self.channel.send_eof()
        return False

    async def _next_head(self, begun: bool) -> h11.Request | None:
        """Wait for a head: idle at first, but from its first byte on it must get on."""
        http, limits, scope = self._h11, self._limits, self.scope
        event = http.next_event()
        if event is h11.NEED_DATA:
            self._begun = begun or bool(http.trailing_data[0])
            wait_s = limits.head_s if self._begun else limits.idle_s
            scope.deadline = trio.current_time() + wait_s
            while event is h11.NEED_DATA:
                http.receive_data(await self.channel.receive())
                event = http.next_event()
                if event is h11.NEED_DATA and not self._begun:
                    self._begun = True
                    scope.deadline = trio.current_time() + limits.head_s
            scope.deadline = math.inf
        self._begun = False
        return event if isinstance(event, h11.Request) else None

    async def _refuse(self, error: h11.RemoteProtocolError | FaultyPeerError) -> None:
        """Tell a client that sends no good HTTP, if it has no answer yet."""
        hint = error.status if isinstance(error, FaultyPeerError) else error.error_status_hint
        if self._h11.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        body = f"{HTTPStatus(hint).phrase}\n".encode()
        headers = [
            (b"content-type", b"text/plain"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        try:
            head = h11.Response(status_code=hint, headers=headers, reason=_REASONS.get(hint, b""))
            data = (self._h11.send(head) or b"") + (self._h11.send(h11.Data(data=body)) or b"")
            await self.channel.send(data)
            await self.channel.send_eof()
        except (BrokenError, h11.LocalProtocolError):
            return  # it has gone, or there is nothing more to say


def _absolute(target: bytes, authority: bytes) -> tuple[bytes, bytes]:
    """Path and authority of the other forms of a target (RFC 9112, section 3.2)."""
    if target == b"*" or b"://" not in target:
        return target, authority
    rest = target.partition(b"://")[2]
    host, slash, path = rest.partition(b"/")
    return slash + path or b"/", host
