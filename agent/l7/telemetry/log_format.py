"""Access log lines: Envoy's command operators, as text and as JSON.

A format is compiled to a list of texts and functions once. What an operator
finds nothing for is `-`; a letter that could end or forge a line is escaped,
since headers are whatever a client sent. Operators that this proxy has nothing
for (`%UPSTREAM_LOCAL_ADDRESS%`) write `-`, so that parsers of Envoy's lines fit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from meshbpf.agent.l7.exchange import Exchange, Protocol
from meshbpf.agent.l7.message import Headers
from meshbpf.agent.l7.telemetry.labels import flags_of, grpc_status

# Istio's EnvoyTextLogFormat (pilot/pkg/model/telemetry_logging.go).
DEFAULT_TEXT = (
    '[%START_TIME%] "%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%" '
    "%RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% "
    '%CONNECTION_TERMINATION_DETAILS% "%UPSTREAM_TRANSPORT_FAILURE_REASON%" '
    "%BYTES_RECEIVED% %BYTES_SENT% %DURATION% %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% "
    '"%REQ(X-FORWARDED-FOR)%" "%REQ(USER-AGENT)%" "%REQ(X-REQUEST-ID)%" '
    '"%REQ(:AUTHORITY)%" "%UPSTREAM_HOST%" %UPSTREAM_CLUSTER% %UPSTREAM_LOCAL_ADDRESS% '
    "%DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% %REQUESTED_SERVER_NAME% "
    "%ROUTE_NAME%\n"
)
# Istio's EnvoyJSONLogFormatIstio.
DEFAULT_LABELS = {
    "start_time": "%START_TIME%",
    "method": "%REQ(:METHOD)%",
    "path": "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%",
    "protocol": "%PROTOCOL%",
    "response_code": "%RESPONSE_CODE%",
    "response_flags": "%RESPONSE_FLAGS%",
    "response_code_details": "%RESPONSE_CODE_DETAILS%",
    "connection_termination_details": "%CONNECTION_TERMINATION_DETAILS%",
    "upstream_transport_failure_reason": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
    "bytes_received": "%BYTES_RECEIVED%",
    "bytes_sent": "%BYTES_SENT%",
    "duration": "%DURATION%",
    "upstream_service_time": "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%",
    "x_forwarded_for": "%REQ(X-FORWARDED-FOR)%",
    "user_agent": "%REQ(USER-AGENT)%",
    "request_id": "%REQ(X-REQUEST-ID)%",
    "authority": "%REQ(:AUTHORITY)%",
    "upstream_host": "%UPSTREAM_HOST%",
    "upstream_cluster": "%UPSTREAM_CLUSTER%",
    "upstream_local_address": "%UPSTREAM_LOCAL_ADDRESS%",
    "downstream_local_address": "%DOWNSTREAM_LOCAL_ADDRESS%",
    "downstream_remote_address": "%DOWNSTREAM_REMOTE_ADDRESS%",
    "requested_server_name": "%REQUESTED_SERVER_NAME%",
    "route_name": "%ROUTE_NAME%",
}

Line = Callable[[Exchange], str]
Scalar = str | int | None
Read = Callable[[Exchange], Scalar]

_MILLISECONDS = "\N{REPLACEMENT CHARACTER}"  # a mark that strftime leaves alone
_OPERATOR = re.compile(r"%([A-Z_0-9]+)(?:\(([^)]*)\))?(?::([0-9]+))?%|%%")
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), 0x7F, *range(0x80, 0xA0))} | {
    ord('"'): '\\"',
    ord("\\"): "\\\\",
}
_PROTOCOLS = {Protocol.HTTP1: "HTTP/1.1", Protocol.HTTP2: "HTTP/2", Protocol.GRPC: "HTTP/2"}
_NOTHING = (
    "CONNECTION_TERMINATION_DETAILS",
    "UPSTREAM_TRANSPORT_FAILURE_REASON",
    "UPSTREAM_LOCAL_ADDRESS",
    "REQUESTED_SERVER_NAME",
    "DOWNSTREAM_TLS_VERSION",
    "FILTER_STATE",
    "DYNAMIC_METADATA",
    "METADATA",
    "ENVIRONMENT",
)


def compile_text(text: str = DEFAULT_TEXT) -> Line:
    """A line (with its own line end) of an exchange. ValueError for an unknown operator."""
    parts = _parts(text or DEFAULT_TEXT)

    def line(exchange: Exchange) -> str:
        out = "".join([part if isinstance(part, str) else _text(part(exchange)) for part in parts])
        return out if out.endswith("\n") else out + "\n"

    return line


def compile_read(text: str) -> Read:
    """A format string as one value, without a line's escapes. ValueError as above."""
    parts = _parts(text)
    return lambda e: "".join(p if isinstance(p, str) else _plain(p(e)) for p in parts)


def compile_json(labels: Mapping[str, str] | None = None) -> Line:
    """A JSON object a line; a field that is one operator alone keeps numbers as numbers."""
    fields = {name: _parts(text) for name, text in (labels or DEFAULT_LABELS).items()}

    def line(exchange: Exchange) -> str:
        record: dict[str, Scalar] = {}
        for name, parts in fields.items():
            if len(parts) == 1 and not isinstance(parts[0], str):
                record[name] = parts[0](exchange)
            else:
                record[name] = "".join(
                    part if isinstance(part, str) else _plain(part(exchange)) for part in parts
                )
        return json.dumps(record, separators=(",", ":")) + "\n"

    return line


def _text(value: Scalar) -> str:
    if value is None or value == "":
        return "-"
    return str(value).translate(_ESCAPES)


def _plain(value: Scalar) -> str:
    return "-" if value is None or value == "" else str(value)


def _parts(text: str) -> list[str | Read]:
    found: list[str | Read] = []
    at = 0
    for operator in _OPERATOR.finditer(text):
        if operator.start() > at:
            found.append(text[at : operator.start()])
        at = operator.end()
        if operator[0] == "%%":
            found.append("%")
            continue
        read = _operator(operator[1], operator[2])
        found.append(read if operator[3] is None else _cut(read, int(operator[3])))
    if at < len(text):
        found.append(text[at:])
    return found


def _cut(read: Read, most: int) -> Read:
    def cut(exchange: Exchange) -> Scalar:
        found = read(exchange)
        return found[:most] if isinstance(found, str) else found

    return cut


def _operator(name: str, argument: str | None) -> Read:
    if name in _NOTHING:
        return lambda _: None
    if name == "START_TIME":
        return _start_time(argument or "")
    if name in ("REQ", "RESP", "TRAILER") and argument:
        first, _, other = argument.partition("?")
        read = {"REQ": _request, "RESP": _response, "TRAILER": _trailer}[name]
        reads = [read(each.lower()) for each in (first, other) if each]
        return lambda exchange: next((v for r in reads if (v := r(exchange)) is not None), None)
    if name in _READERS:
        return _READERS[name]
    raise ValueError(f"%{name}% is not an operator that this proxy knows")


def _start_time(form: str) -> Read:
    if not form:

        def milliseconds(exchange: Exchange) -> str:
            at = datetime.fromtimestamp(exchange.started_wall_s, UTC)
            return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")

        return milliseconds

    # Envoy's %3f is milliseconds, which strftime has not.
    form = form.replace("%3f", _MILLISECONDS)

    def formatted(exchange: Exchange) -> str:
        at = datetime.fromtimestamp(exchange.started_wall_s, UTC)
        return at.strftime(form).replace(_MILLISECONDS, f"{at.microsecond // 1000:03d}")

    return formatted


def _request(name: str) -> Read:
    match name:
        case ":method":
            return lambda e: e.request.method
        case ":path":
            return lambda e: e.request.path
        case ":authority" | "host":
            return lambda e: e.request.authority
        case ":scheme":
            return lambda e: e.request.scheme
        case "x-request-id":
            return lambda e: e.request.headers.get("x-request-id") or e.request_id or None
    return lambda e: e.request.headers.get(name)


def _response(name: str) -> Read:
    if name == "x-envoy-upstream-service-time":
        return _upstream_ms
    return lambda e: e.response.headers.get(name) if e.response else None


def _trailer(name: str) -> Read:
    def read(exchange: Exchange) -> Scalar:
        trailers: Headers | None = exchange.response.trailers if exchange.response else None
        return None if trailers is None else trailers.get(name)

    return read


def _upstream_ms(exchange: Exchange) -> int | None:
    if not exchange.attempts or not exchange.first_byte_s:
        return None
    return round((exchange.first_byte_s - exchange.started_s) * 1000)


def _cluster(exchange: Exchange) -> str | None:
    service = exchange.endpoint_service
    return None if service is None else service.hostname


_READERS: Mapping[str, Read] = {
    "PROTOCOL": lambda e: _PROTOCOLS.get(e.protocol),
    "RESPONSE_CODE": lambda e: e.response.status if e.response else 0,
    "RESPONSE_FLAGS": flags_of,
    "RESPONSE_CODE_DETAILS": lambda e: e.detail or None,
    "BYTES_RECEIVED": lambda e: e.request_bytes,
    "BYTES_SENT": lambda e: e.response_bytes,
    "DURATION": lambda e: round((e.ended_s - e.started_s) * 1000),
    "RESPONSE_DURATION": _upstream_ms,
    "GRPC_STATUS": lambda e: grpc_status(e) or None,
    "GRPC_STATUS_NUMBER": lambda e: grpc_status(e) or None,
    "UPSTREAM_HOST": lambda e: str(e.endpoint_address) if e.endpoint_address else None,
    "UPSTREAM_REMOTE_ADDRESS": lambda e: str(e.endpoint_address) if e.endpoint_address else None,
    "UPSTREAM_CLUSTER": _cluster,
    "UPSTREAM_CLUSTER_RAW": _cluster,
    "UPSTREAM_REQUEST_ATTEMPT_COUNT": lambda e: e.attempts,
    "DOWNSTREAM_LOCAL_ADDRESS": lambda e: str(e.destination.authority),
    "DOWNSTREAM_REMOTE_ADDRESS": lambda e: str(e.caller.address),
    "DOWNSTREAM_DIRECT_REMOTE_ADDRESS": lambda e: str(e.caller.address),
    "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT": lambda e: str(e.caller.address.ip),
    "DOWNSTREAM_PEER_URI_SAN": lambda e: str(e.caller.identity) if e.caller.identity else None,
    "ROUTE_NAME": lambda e: e.route or None,
    "REQUEST_ID": lambda e: e.request_id or None,
    "TRACE_ID": lambda e: e.attributes["trace"].trace_id if "trace" in e.attributes else None,
}
