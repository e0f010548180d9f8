"""What the two HTTPs have in common, towards clients and towards endpoints."""

from __future__ import annotations

from typing import Protocol

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.l7.message import Headers, RawHeaders, RequestHead, ResponseHead
from meshbpf.agent.runtime.waypoint.channel import Channel

# RFC 9110, section 7.6.1: for one connection only. `te` may stay as "trailers".
_HOP_BY_HOP = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade", b"te"}
)


class FaultyPeerError(MeshbpfError):
    """The other side broke HTTP's rules; `status` is what to answer a client."""

    def __init__(self, what: str, status: int = 400) -> None:
        super().__init__("http-fault", what)
        self.status = status


class UnsentError(MeshbpfError):
    """The endpoint has not looked at the request: it may be sent again, whatever it is."""


class ClientGoneError(MeshbpfError):
    """Nobody waits for the answer any more."""


class ClientRequest(Protocol):
    """One request of a client: read it, then answer it."""

    head: RequestHead
    has_body: bool
    body_bytes: int | None
    """As announced; None when it is not."""

    @property
    def arrived(self) -> bool:
        """All of the body has been received: reading it takes no wait."""
        ...

    upgrade: str
    """The protocol that the client wants instead (`websocket`), lower-case; "" for none."""

    gone: bool
    """The client has left before it was answered."""

    def give_up(self) -> None:
        """The client has been found to be gone."""
        ...

    @property
    def trailers(self) -> Headers | None:
        """At the end of its body."""
        ...

    async def read_body(self) -> bytes:
        """Some of the body; b"" at its end."""
        ...

    async def respond(self, head: ResponseHead, *, has_body: bool) -> None:
        """Send the answer's head. Without a body the answer is complete."""
        ...

    async def send_body(self, data: bytes) -> None:
        """Send some of the body."""
        ...

    async def end_body(self, trailers: Headers | None) -> None:
        """The answer is complete."""
        ...

    async def switch(self, head: ResponseHead) -> tuple[Channel, bytes]:
        """Answer 101 and hand over the connection, with what was received beyond the request."""
        ...

    def abort(self) -> None:
        """The answer will not be complete: say so in the way that the protocol has."""
        ...


class UpstreamRequest(Protocol):
    """One request to an endpoint."""

    @property
    def trailers(self) -> Headers | None:
        """Of the answer, at its end."""
        ...

    @property
    def empty(self) -> bool:
        """The answer has no body, as far as can be told once its head is there."""
        ...

    @property
    def replayable(self) -> bool:
        """It broke on a connection that had served others, and not a byte of an answer came.

        Most likely the endpoint had closed it, and never saw the request.
        """
        ...

    async def send_head(self, head: RequestHead, *, has_body: bool, upgrade: str) -> None:
        """Begin. Raises BrokenError, or UnsentError."""
        ...

    async def send_body(self, data: bytes) -> None:
        """Send some of the body."""
        ...

    async def end_body(self, trailers: Headers | None) -> None:
        """The request is complete."""
        ...

    async def read_head(self) -> ResponseHead:
        """Wait for the final answer's head. Raises BrokenError, UnsentError, FaultyPeerError."""
        ...

    async def read_body(self) -> bytes:
        """Some of the answer's body; b"" at its end."""
        ...

    def switch(self) -> tuple[Channel, bytes]:
        """After a 101: the connection, and what was received beyond it."""
        ...

    def release(self) -> None:
        """Be done: the connection serves others if the exchange is complete, else it is cut."""
        ...


def without_hops(headers: RawHeaders) -> RawHeaders:
    """Fields that are for the other side of a proxy too."""
    named: frozenset[bytes] = _HOP_BY_HOP
    for name, value in headers:
        if name == b"connection":
            listed = (each.strip().lower() for each in value.split(b","))
            named = named.union(each for each in listed if each != b"host")
    kept = [(name, value) for name, value in headers if name not in named]
    if any(name == b"te" and b"trailers" in value.lower() for name, value in headers):
        kept.append((b"te", b"trailers"))
    return kept
