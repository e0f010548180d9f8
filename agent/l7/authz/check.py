"""Asking an ext_authz service, and reading its answer: over HTTP, and over gRPC.

Envoy's two forms. HTTP: the request's own method and path (after a prefix)
with chosen headers; 200 allows, 5xx is an error, anything else is the answer
for the client. gRPC: `envoy.service.auth.v3.Authorization/Check`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from meshbpf.agent.core.policy import StringMatch
from meshbpf.agent.l7.exchange import Connection, Exchange
from meshbpf.agent.l7.filter import Call, CallAnswer
from meshbpf.agent.l7.message import Headers, RequestHead
from meshbpf.agent.l7.providers import Authorizer
from meshbpf.agent.wire.grpc import Decoder, GrpcError, Status, encode, request_headers, status_of
from meshbpf.agent.wire.pb import ext_authz_pb2 as pb

_METHOD = "envoy.service.auth.v3.Authorization/Check"
_ALWAYS_SHOWN = frozenset({"authorization"})  # beside Host, Method, Path, Content-Length
_ALWAYS_TOLD = frozenset({"www-authenticate", "location", "content-type"})
# Of one hop, or the driver's own to write.
_HOP = frozenset(
    {"connection", "content-length", "host", "keep-alive", "te", "transfer-encoding", "upgrade"}
)
_MAX_ANSWER_BYTES = 1024 * 1024

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Allowed:
    """Go on, with these edits."""

    set: Pairs = ()
    append: Pairs = ()
    remove: tuple[str, ...] = ()
    for_client: Pairs = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """Answer this."""

    status: int
    body: bytes = b""
    headers: Pairs = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """The authorizer said nothing that could be understood."""

    reason: str


Answer = Allowed | Refused | Failed


def check_call(authorizer: Authorizer, exchange: Exchange, body: bytes) -> Call:
    """What to send."""
    if authorizer.grpc:
        return _grpc_call(authorizer, check_request(authorizer, exchange, body))
    return _http_call(authorizer, exchange, body)


def connection_call(authorizer: Authorizer, connection: Connection) -> Call:
    """What to send about an opaque connection, to an authorizer that speaks gRPC."""
    message = pb.CheckRequest()
    _both_ends(message.attributes, connection)
    return _grpc_call(authorizer, message)


def read_answer(authorizer: Authorizer, answer: CallAnswer) -> Answer:
    """What came back."""
    read = _grpc_answer if authorizer.grpc else _http_answer
    return read(authorizer, answer)


# --- HTTP


def _http_call(authorizer: Authorizer, exchange: Exchange, body: bytes) -> Call:
    request = exchange.request
    headers = Headers(
        (name, value)
        for name, value in request.headers.raw
        if (key := name.decode("latin-1")) not in _HOP
        and (key in _ALWAYS_SHOWN or _any(authorizer.request_headers, key))
    )
    for name, value in authorizer.added_headers:
        headers.set(name, value)
    path = authorizer.path_prefix + request.path
    head = RequestHead(request.method, path, request.authority, headers)
    return Call(authorizer.target, head, body, authorizer.timeout_s, limit_bytes=_MAX_ANSWER_BYTES)


def _http_answer(authorizer: Authorizer, answer: CallAnswer) -> Answer:
    status, headers = answer.head.status, answer.head.headers
    if status >= 500:
        return Failed(f"it answered {status}")
    fields = [(name, value) for name, value in headers.items() if name not in _HOP]
    if status == 200:
        return Allowed(
            set=tuple(pair for pair in fields if _any(authorizer.upstream_headers, pair[0])),
            for_client=tuple(pair for pair in fields if _any(authorizer.allowed_headers, pair[0])),
        )
    told = authorizer.denied_headers
    return Refused(
        status,
        answer.body,
        tuple(
            pair for pair in fields if not told or pair[0] in _ALWAYS_TOLD or _any(told, pair[0])
        ),
    )


def _any(patterns: Iterable[StringMatch], name: str) -> bool:
    return any(pattern.matches(name) for pattern in patterns)


# --- gRPC


def _grpc_call(authorizer: Authorizer, message: pb.CheckRequest) -> Call:
    fields = request_headers(_METHOD, str(authorizer.target), timeout_s=authorizer.timeout_s)
    headers = Headers(
        (name.encode(), value.encode()) for name, value in fields if not name.startswith(":")
    )
    head = RequestHead("POST", f"/{_METHOD}", str(authorizer.target), headers)
    return Call(
        authorizer.target,
        head,
        encode(message.SerializeToString()),
        authorizer.timeout_s,
        http2=True,
        limit_bytes=_MAX_ANSWER_BYTES,
    )


def check_request(authorizer: Authorizer, exchange: Exchange, body: bytes) -> pb.CheckRequest:
    """The message."""
    request = exchange.request
    message = pb.CheckRequest()
    attributes = message.attributes
    _both_ends(attributes, exchange.connection)
    attributes.request.time.FromNanoseconds(int(exchange.started_wall_s * 1e9))
    http = attributes.request.http
    http.id = exchange.request_id
    http.method, http.path, http.scheme = request.method, request.path, request.scheme
    http.host, http.protocol = request.authority, _PROTOCOLS.get(exchange.protocol, "HTTP/2")
    for name in dict.fromkeys(name for name, _ in request.headers.items()):
        # A protobuf string is UTF-8: bytes beyond ASCII are shown as the letters they are in it.
        http.headers[name] = request.headers.get(name) or ""
    for name, value in (
        (":authority", request.authority),
        (":method", request.method),
        (":path", request.path),
        (":scheme", request.scheme),
    ):
        http.headers[name] = value
    http.size = len(body) if authorizer.body is not None else -1
    if authorizer.body is not None and authorizer.body.as_bytes:
        http.raw_body = body
    else:
        http.body = body.decode("utf-8", "replace")
    return message


_PROTOCOLS = {"http": "HTTP/1.1"}


def _both_ends(attributes: pb.AttributeContext, connection: Connection) -> None:
    caller, address = connection.caller, connection.destination.address
    _peer(attributes.source, str(caller.address.ip), caller.address.port)
    if caller.identity is not None:
        attributes.source.principal = str(caller.identity)
    if address is not None:
        _peer(attributes.destination, str(address.ip), address.port)


def _peer(peer: pb.AttributeContext.Peer, address: str, port: int) -> None:
    peer.address.socket_address.address = address
    peer.address.socket_address.port_value = port


def _grpc_answer(authorizer: Authorizer, answer: CallAnswer) -> Answer:
    fields = [(":status", str(answer.head.status)), *answer.head.headers.items()]
    try:
        status = status_of(_METHOD, fields)
        if status is None and answer.head.trailers is not None:
            status = status_of(_METHOD, answer.head.trailers.items())
        if isinstance(status, GrpcError):
            return Failed(status.what)
        if status is None:
            return Failed("it ended the call without a status")
        (message,) = Decoder(_METHOD, _MAX_ANSWER_BYTES).feed(answer.body)
        return read_response(pb.CheckResponse.FromString(message))
    except (GrpcError, DecodeError, ValueError) as error:
        return Failed(f"its answer cannot be read: {error}")


def read_response(message: pb.CheckResponse) -> Answer:
    """What the message says."""
    if message.status.code != Status.OK:
        denied = message.denied_response
        return Refused(denied.status.code or 403, denied.body.encode(), _options(denied.headers)[2])
    ok = message.ok_response
    replaced, appended, _ = _options(ok.headers)
    return Allowed(
        replaced,
        appended,
        tuple(name.lower() for name in ok.headers_to_remove if not name.startswith(":")),
        _options(ok.response_headers_to_add)[2],
    )


def _options(options: Iterable[pb.HeaderValueOption]) -> tuple[Pairs, Pairs, Pairs]:
    """(those that replace, those that are appended, all), in order."""
    replaced: list[tuple[str, str]] = []
    appended: list[tuple[str, str]] = []
    every: list[tuple[str, str]] = []
    for option in options:
        name = option.header.key.lower()
        if not name or name.startswith(":") or name in _HOP:
            continue
        pair = (name, option.header.value or option.header.raw_value.decode("latin-1"))
        every.append(pair)
        (appended if option.append.value else replaced).append(pair)
    return tuple(replaced), tuple(appended), tuple(every)
