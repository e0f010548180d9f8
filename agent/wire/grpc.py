"""gRPC over HTTP/2, the part without I/O: message framing, headers, status.

Source: the gRPC project's "gRPC over HTTP2" protocol description. Only what a
client needs, uncompressed: `grpc-encoding: identity` is what every peer of
ours (CRI runtimes, istiod) answers with when no other is offered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from urllib.parse import unquote

from h2.errors import ErrorCodes

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.wire.frames import HEADER_BYTES, FrameType

PREFIX_BYTES = 5  # one flag byte, four of length
# ztunnel's limit for one xDS message; a runtime's answers are far smaller.
MAX_MESSAGE_BYTES = 200 * 1024 * 1024
_MAX_GOAWAY_BYTES = 16 * 1024


class Status(IntEnum):
    """gRPC status codes, as `grpc-status` carries them."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


# "HTTP to gRPC Status Code Mapping": for peers that answer without grpc-status.
_FROM_HTTP = {
    400: Status.INTERNAL,
    401: Status.UNAUTHENTICATED,
    403: Status.PERMISSION_DENIED,
    404: Status.UNIMPLEMENTED,
    429: Status.UNAVAILABLE,
    502: Status.UNAVAILABLE,
    503: Status.UNAVAILABLE,
    504: Status.UNAVAILABLE,
}

# "HTTP2 Transport Mapping, Errors": what a reset stream means for its call.
_FROM_RESET = {
    ErrorCodes.REFUSED_STREAM: Status.UNAVAILABLE,
    ErrorCodes.CANCEL: Status.CANCELLED,
    ErrorCodes.ENHANCE_YOUR_CALM: Status.RESOURCE_EXHAUSTED,
    ErrorCodes.INADEQUATE_SECURITY: Status.PERMISSION_DENIED,
}


class GrpcError(MeshbpfError):
    """A call that ended with a status other than OK, or broke the protocol."""

    def __init__(self, method: str, status: Status, message: str) -> None:
        super().__init__(
            "grpc-" + status.name.lower().replace("_", "-"),
            f"gRPC call {method} ended with {status.name}" + (f": {message}" if message else ""),
        )
        self.status = status


def encode(message: bytes) -> bytes:
    """A message with its length prefix, uncompressed."""
    return b"\0" + len(message).to_bytes(4, "big") + message


class Decoder:
    """Takes DATA payloads in any split, yields whole messages.

    Raises GrpcError on a compressed message (none was offered) and on one
    longer than `limit_bytes`, before its bytes are buffered.
    """

    def __init__(self, method: str, limit_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._method = method
        self._limit_bytes = limit_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield each message that `data` completes."""
        self._buffer += data
        while len(self._buffer) >= PREFIX_BYTES:
            if self._buffer[0]:
                raise GrpcError(self._method, Status.INTERNAL, "a compressed message, none offered")
            length = int.from_bytes(self._buffer[1:PREFIX_BYTES], "big")
            if length > self._limit_bytes:
                raise GrpcError(
                    self._method,
                    Status.RESOURCE_EXHAUSTED,
                    f"a message of {length} bytes, the limit is {self._limit_bytes}",
                )
            end = PREFIX_BYTES + length
            if len(self._buffer) < end:
                return
            message = bytes(self._buffer[PREFIX_BYTES:end])
            del self._buffer[:end]
            yield message

    def finish(self) -> None:
        """Check that the stream did not end inside a message."""
        if self._buffer:
            raise GrpcError(self._method, Status.INTERNAL, "the stream ended inside a message")


class MessageCount:
    """Counts the messages of a stream that others carry, in any split, whatever is in them."""

    __slots__ = ("_left", "_prefix", "total")

    def __init__(self) -> None:
        self.total = 0
        """Messages whose prefix has come whole."""
        self._prefix = b""
        self._left = 0

    def feed(self, data: bytes | memoryview) -> None:
        """Some more of the stream."""
        at = 0
        while True:
            step = min(self._left, len(data) - at)
            self._left -= step
            at += step
            if at == len(data):
                return
            more = bytes(data[at : at + PREFIX_BYTES - len(self._prefix)])
            at += len(more)
            self._prefix += more
            if len(self._prefix) == PREFIX_BYTES:
                self._left = int.from_bytes(self._prefix[1:], "big")
                self._prefix = b""
                self.total += 1


def request_headers(
    method: str,
    authority: str,
    *,
    scheme: str = "http",
    timeout_s: float | None = None,
    metadata: Sequence[tuple[str, str]] = (),
) -> list[tuple[str, str]]:
    """The header block that opens a call to `method` ("package.Service/Method")."""
    headers = [
        (":method", "POST"),
        (":scheme", scheme),
        (":path", "/" + method),
        (":authority", authority),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("user-agent", "meshbpf"),
    ]
    if timeout_s is not None:
        # TimeoutValue has at most eight digits: milliseconds reach a day.
        headers.append(("grpc-timeout", f"{min(max(1, int(timeout_s * 1000)), 99_999_999)}m"))
    headers.extend(metadata)
    return headers


def status_of(method: str, headers: Iterable[tuple[str, str]]) -> Status | GrpcError | None:
    """How the call ended, by these headers or trailers: OK, or the error.

    None when they say nothing yet: the ordinary headers before messages.
    """
    fields = dict(headers)
    code = fields.get("grpc-status")
    if code is None:
        return _http_error(method, fields)
    # Codes beyond the list are UNKNOWN, says the specification.
    known = code.isascii() and code.isdigit() and len(code) <= 2
    number = int(code) if known else Status.UNKNOWN.value
    status = Status(number) if number <= Status.UNAUTHENTICATED else Status.UNKNOWN
    if status is Status.OK:
        return status
    return GrpcError(method, status, unquote(fields.get("grpc-message", "")))


def _http_error(method: str, fields: dict[str, str]) -> GrpcError | None:
    """For headers without `grpc-status`: whether it is a gRPC server that speaks."""
    http = fields.get(":status")
    if http is None:
        return None  # trailers: whoever waits for the end finds the status missing
    if http != "200":
        known = http.isascii() and http.isdigit() and len(http) == 3
        status = _FROM_HTTP.get(int(http) if known else 0, Status.UNKNOWN)
        return GrpcError(method, status, f"HTTP status {http}")
    kind = fields.get("content-type", "")
    if kind.partition(";")[0].partition("+")[0].strip() != "application/grpc":
        return GrpcError(method, Status.UNKNOWN, f"the answer is {kind or 'of no type'}, not gRPC")
    return None


def reset_error(method: str, code: int) -> GrpcError:
    """The error of a call whose stream the server reset with an HTTP/2 `code`."""
    try:
        known = ErrorCodes(code)
    except ValueError:
        return GrpcError(method, Status.UNKNOWN, f"the server reset the stream with code {code}")
    status = _FROM_RESET.get(known, Status.INTERNAL)
    return GrpcError(method, status, f"the server reset the stream: {known.name}")


@dataclass(frozen=True, slots=True)
class GoAway:
    """The server takes no new stream; those up to `last_stream_id` it still serves."""

    last_stream_id: int
    code: int

    @property
    def reason(self) -> str:
        """For people."""
        if self.code == ErrorCodes.NO_ERROR:
            return "the server is going away"
        name = ErrorCodes(self.code).name if self.code in set(ErrorCodes) else str(self.code)
        return f"the server is going away: {name}"


class GoAwayFilter:
    """Takes GOAWAY out of what a server sends; the rest is for h2.

    h2 knows no orderly end: it takes the connection for closed at the first
    GOAWAY and everything after it for a fault, while gRPC servers announce
    with it that they will finish the calls they have and then leave.
    """

    def __init__(self) -> None:
        self._head = bytearray()
        """Beginning of a frame header, not passed on yet."""
        self._left = 0
        """Payload of a frame that h2 gets, still to come."""
        self._goaway = bytearray()
        self._goaway_left = 0

    def feed(self, data: bytes) -> Iterator[bytes | GoAway]:
        """Bytes for h2 and what was taken out, in order."""
        view = memoryview(data)
        while view:
            if self._goaway_left:
                step = min(self._goaway_left, len(view))
                self._goaway += view[:step]
                self._goaway_left -= step
                view = view[step:]
                if not self._goaway_left:
                    yield self._read_goaway()
            elif self._left:
                step = min(self._left, len(view))
                self._left -= step
                yield bytes(view[:step])
                view = view[step:]
            else:
                step = min(HEADER_BYTES - len(self._head), len(view))
                self._head += view[:step]
                view = view[step:]
                if len(self._head) == HEADER_BYTES:
                    yield from self._begin()

    def _begin(self) -> Iterator[bytes]:
        head = bytes(self._head)
        self._head.clear()
        size = int.from_bytes(head[:3], "big")
        # One that is too short or too long is left to h2, which refuses it.
        if head[3] == FrameType.GOAWAY and 8 <= size <= _MAX_GOAWAY_BYTES:
            self._goaway_left = size
            return
        self._left = size
        yield head

    def _read_goaway(self) -> GoAway:
        last = int.from_bytes(self._goaway[:4], "big") & 0x7FFFFFFF
        code = int.from_bytes(self._goaway[4:8], "big")
        self._goaway.clear()
        return GoAway(last, code)
