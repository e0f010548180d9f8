"""gRPC over HTTP/2, the part without I/O: message framing, headers, status.

Source: the gRPC project's "gRPC over HTTP2" protocol description. Only what a
client needs, uncompressed: `grpc-encoding: identity` is what every peer of
ours (CRI runtimes, istiod) answers with when no other is offered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from urllib.parse import unquote

from meshbpf.agent.core.errors import MeshbpfError

PREFIX_BYTES = 5  # one flag byte, four of length
# ztunnel's limit for one xDS message; a runtime's answers are far smaller.
MAX_MESSAGE_BYTES = 200 * 1024 * 1024


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


def status_of(method: str, headers: Iterable[tuple[str, str]]) -> GrpcError | None:
    """The error that these headers or trailers carry; None for OK.

    Headers without `grpc-status` are no end of a call when HTTP says 200.
    """
    fields = dict(headers)
    code = fields.get("grpc-status")
    if code is None:
        http = fields.get(":status", "200")
        if http == "200":
            return None
        known = _FROM_HTTP.get(int(http) if http.isdigit() else 0, Status.UNKNOWN)
        return GrpcError(method, known, f"HTTP status {http}")
    # Codes beyond the list are UNKNOWN, says the specification.
    number = int(code) if code.isdigit() else Status.UNKNOWN.value
    status = Status(number) if number <= Status.UNAUTHENTICATED else Status.UNKNOWN
    if status is Status.OK:
        return None
    return GrpcError(method, status, unquote(fields.get("grpc-message", "")))
