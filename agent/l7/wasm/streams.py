"""What a plugin's contexts hold: the root's, and one for each request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from meshbpf.agent.l7.exchange import Exchange
from meshbpf.agent.l7.filter import CallAnswer, Reply
from meshbpf.agent.l7.message import Headers, RawHeaders, RequestHead, ResponseHead
from meshbpf.agent.l7.wasm.abi import MapType

# HTTP keeps them outside the fields, proxy-wasm inside.
_REQUEST_PSEUDO = (b":method", b":path", b":authority", b":scheme")


@dataclass(frozen=True, slots=True)
class Dispatched:
    """A call that a guest wants made."""

    token: int
    upstream: str
    head: RequestHead
    body: bytes
    timeout_s: float


@dataclass(slots=True)
class Context:
    """One context of a plugin; the root's has no exchange."""

    id: int
    exchange: Exchange | None = None
    dispatched: list[Dispatched] = field(default_factory=list)
    reply: Reply | None = None
    resumed: bool = False
    """The guest asked to go on since it paused last."""
    body: bytes | None = None
    """The body that is being looked at."""
    body_changed: bool = False
    in_response: bool = False
    answer: CallAnswer | None = None
    """The call whose response is being handled."""
    properties: dict[bytes, bytes] = field(default_factory=dict)
    """Those that the guest set itself."""

    def take_reply(self) -> Reply | None:
        """What the guest wants answered, if anything."""
        reply, self.reply = self.reply, None
        return reply

    def changed_body(self) -> bytes | None:
        """The body as the guest left it, None where it did not touch it; ends the look at it."""
        body, self.body = self.body, None
        return body if self.body_changed else None


class FieldMap:
    """One header map as the guest sees it: pseudo-headers first, and writable."""

    __slots__ = ("_get", "_set", "headers")

    def __init__(
        self,
        headers: Headers,
        get: Callable[[], RawHeaders] = list,
        write: Callable[[bytes, bytes], bool] | None = None,
    ) -> None:
        self.headers = headers
        self._get = get
        self._set = write

    def pairs(self) -> RawHeaders:
        """All fields."""
        return self._get() + self.headers.raw

    def value(self, name: bytes) -> bytes | None:
        """All values of a field as one; None without one."""
        name = name.lower()
        source = self._get() if name.startswith(b":") else self.headers.raw
        found = [value for key, value in source if key == name]
        return b",".join(found) if found else None

    def replace(self, name: bytes, value: bytes) -> bool:
        """Exactly one field of this name; False when it cannot be written."""
        name = name.lower()
        if name.startswith(b":"):
            return self._set is not None and self._set(name, value)
        if not _writable(name, value):
            return False
        self.remove(name)
        self.headers.raw.append((name, value))
        return True

    def add(self, name: bytes, value: bytes) -> bool:
        """One more field."""
        name = name.lower()
        if name.startswith(b":"):
            return self.replace(name, value)
        if not _writable(name, value):
            return False
        self.headers.raw.append((name, value))
        return True

    def remove(self, name: bytes) -> None:
        """No field of this name; pseudo-headers stay."""
        name = name.lower()
        self.headers.raw = [pair for pair in self.headers.raw if pair[0] != name]

    def replace_all(self, pairs: RawHeaders) -> bool:
        """These fields and no others."""
        pairs = [(name.lower(), value) for name, value in pairs]
        plain = [pair for pair in pairs if not pair[0].startswith(b":")]
        if not all(_writable(*pair) for pair in plain):
            return False
        self.headers.raw = plain
        return all(self.replace(*pair) for pair in pairs if pair[0].startswith(b":"))


def field_map(context: Context, kind: int) -> FieldMap | None:
    """A map of the context; None where there is none now."""
    exchange, answer = context.exchange, context.answer
    match kind:
        case MapType.REQUEST_HEADERS if exchange is not None:
            return _request_map(exchange.request)
        case MapType.RESPONSE_HEADERS if exchange is not None and exchange.response is not None:
            return _response_map(exchange.response)
        case MapType.RESPONSE_TRAILERS if exchange is not None and exchange.response is not None:
            trailers = exchange.response.trailers
            return None if trailers is None else FieldMap(trailers)
        case MapType.CALL_RESPONSE_HEADERS if answer is not None:
            return _response_map(answer.head)
        case MapType.CALL_RESPONSE_TRAILERS if answer is not None:
            return FieldMap(answer.head.trailers or Headers())
    return None


def _request_map(request: RequestHead) -> FieldMap:
    def get() -> RawHeaders:
        parts = (request.method, request.path, request.authority, request.scheme)
        return [
            (name, part.encode("latin-1", "replace"))
            for name, part in zip(_REQUEST_PSEUDO, parts, strict=True)
        ]

    def write(name: bytes, value: bytes) -> bool:
        text = value.decode("latin-1")
        if not text or any(character <= " " for character in text):
            return False
        match name:
            case b":method":
                request.method = text
            case b":path" if text.startswith("/"):
                request.path = text
            case b":authority":
                request.authority = text
            case _:
                return False
        return True

    return FieldMap(request.headers, get, write)


def _response_map(response: ResponseHead) -> FieldMap:
    def get() -> RawHeaders:
        return [(b":status", str(response.status).encode())]

    def write(name: bytes, value: bytes) -> bool:
        if name != b":status" or not value.isdigit() or not 200 <= int(value) <= 599:
            return False
        response.status = int(value)
        return True

    return FieldMap(response.headers, get, write)


def _writable(name: bytes, value: bytes) -> bool:
    """Whether the field can stand in a message: a guest must not smuggle another one in."""
    return (
        bool(name)
        and not any(c <= 0x20 or c == 0x3A or c >= 0x7F for c in name)
        and not any(c in (0, 10, 13) for c in value)
    )
