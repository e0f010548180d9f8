"""HTTP/1.1 with an endpoint, over h11: one request at a time, then the connection is free."""

from __future__ import annotations

from collections.abc import Callable

import h11

from meshbpf.agent.l7.message import Headers, RequestHead, ResponseHead
from meshbpf.agent.runtime.waypoint.channel import BrokenError, Channel
from meshbpf.agent.runtime.waypoint.h11_headers import checked
from meshbpf.agent.runtime.waypoint.limits import Limits
from meshbpf.agent.runtime.waypoint.message import FaultyPeerError, without_hops

_SWITCHING = 101
_HOPS = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"upgrade"})


class Http1Connection:
    """One connection to an endpoint. An `UpstreamRequest` while it is used."""

    def __init__(self, channel: Channel, limits: Limits) -> None:
        self.channel = channel
        self.served = 0
        """Requests that it has carried: a used one may have been closed unnoticed."""
        self.on_free: Callable[[Http1Connection], None] | None = None
        self.draining = False
        """Take no other request: its endpoint is gone."""
        self.idle_since_s = 0.0
        self.trailers: Headers | None = None
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=limits.head_bytes)
        self._answered = False
        self._switched = False
        self._empty = False

    @property
    def empty(self) -> bool:
        """See UpstreamRequest."""
        return self._empty

    @property
    def replayable(self) -> bool:
        """See UpstreamRequest."""
        return self.served > 1 and not self._answered

    async def send_head(self, head: RequestHead, *, has_body: bool, upgrade: str) -> None:
        """See UpstreamRequest."""
        self.served += 1
        headers = [(b"host", head.authority.encode("latin-1")), *head.headers.raw]
        if upgrade:
            headers += [(b"connection", b"Upgrade"), (b"upgrade", upgrade.encode("latin-1"))]
        if has_body and "content-length" not in head.headers:
            headers.append((b"transfer-encoding", b"chunked"))
        try:
            event = h11.Request(
                method=head.method.encode("ascii"),
                target=head.path.encode("latin-1"),
                headers=checked(headers),
            )
            data = self._h11.send(event) or b""
            if not has_body:
                data += self._h11.send(h11.EndOfMessage()) or b""
        except (h11.LocalProtocolError, UnicodeEncodeError) as error:
            # What HTTP/2 or a filter has let pass is no HTTP/1.1.
            raise FaultyPeerError(f"the request cannot be said in HTTP/1.1: {error}") from error
        await self.channel.send(data)

    async def send_body(self, data: bytes) -> None:
        """See UpstreamRequest."""
        await self.channel.send(self._serialize(h11.Data(data=data)))

    async def end_body(self, trailers: Headers | None) -> None:
        """See UpstreamRequest."""
        data = self._serialize(h11.EndOfMessage(headers=trailers.raw if trailers else []))
        if data:
            await self.channel.send(data)

    async def read_head(self) -> ResponseHead:
        """See UpstreamRequest. Informational answers but 101 are dropped."""
        while True:
            event = await self._next()
            if isinstance(event, h11.InformationalResponse):
                if event.status_code != _SWITCHING:
                    continue
                self._switched = True
                return ResponseHead(_SWITCHING, Headers(event.headers))
            if isinstance(event, h11.Response):
                raw = list(event.headers)
                self._empty = (b"content-length", b"0") in raw or event.status_code in (204, 304)
                if any(name in _HOPS for name, _ in raw):
                    raw = without_hops(raw)
                return ResponseHead(event.status_code, Headers(raw))
            raise BrokenError("the endpoint closed the connection before it answered")

    async def read_body(self) -> bytes:
        """See UpstreamRequest."""
        while True:
            event = await self._next()
            if isinstance(event, h11.Data):
                if event.data:
                    return bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                if event.headers:
                    self.trailers = Headers(event.headers)
                return b""
            else:
                raise BrokenError("the endpoint closed the connection in the middle of its answer")

    def switch(self) -> tuple[Channel, bytes]:
        """See UpstreamRequest."""
        return self.channel, self._h11.trailing_data[0]

    def release(self) -> None:
        """See UpstreamRequest."""
        http = self._h11
        if self._switched:
            return
        reusable = http.our_state is h11.DONE and http.their_state is h11.DONE
        if not reusable or self.draining or self.on_free is None or http.trailing_data[0]:
            self.channel.close()
            if self.on_free is not None:
                self.draining = True
                self.on_free(self)
            return
        http.start_next_cycle()
        self._answered = False
        self.trailers = None
        self.on_free(self)

    def _serialize(self, event: h11.Event) -> bytes:
        try:
            return self._h11.send(event) or b""
        except h11.LocalProtocolError as error:
            raise FaultyPeerError(f"the request's body is not as announced: {error}") from error

    async def _next(self) -> object:
        http = self._h11
        try:
            while (event := http.next_event()) is h11.NEED_DATA:
                data = await self.channel.receive()
                self._answered = self._answered or bool(data)
                http.receive_data(data)
        except h11.RemoteProtocolError as error:
            if not self._answered:
                raise BrokenError("the endpoint closed the connection unanswered") from error
            raise FaultyPeerError(f"the endpoint's answer is no HTTP: {error}", 502) from error
        return event
