"""CEL expressions over an exchange: the filters of access logs, the values of metric tags.

Google's C++ implementation through cel-expr-python (extra `cel`), behind this
file alone, as it is young. The attributes are Envoy's
(envoyproxy.io, "Attributes"); what is not there is not there, and an
expression that asks for it fails, which is told as None.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from meshbpf.agent.l7.exchange import Exchange, Protocol
from meshbpf.agent.l7.message import Headers
from meshbpf.agent.l7.telemetry.labels import flags_of

try:
    from cel_expr_python import cel
except ImportError as missing:
    _MISSING = f"{missing}; install meshbpf[cel]"
else:
    _MISSING = ""

Evaluate = Callable[[Exchange], Any]
_MAX_EXPRESSION_CHARS = 4096
_PROTOCOLS = {Protocol.HTTP1: "HTTP/1.1", Protocol.HTTP2: "HTTP/2", Protocol.GRPC: "HTTP/2"}
_VARIABLES = ("request", "response", "connection", "source", "destination", "upstream")


def compile_expression(text: str) -> Evaluate:
    """An evaluator, which answers None when the expression fails. ValueError for a bad one."""
    if _MISSING:
        raise ValueError(f"cannot be evaluated: {_MISSING}")
    if len(text) > _MAX_EXPRESSION_CHARS:
        raise ValueError(f"is longer than {_MAX_EXPRESSION_CHARS} characters")
    variables = {name: cel.Type.Map(cel.Type.STRING, cel.Type.DYN) for name in _VARIABLES}
    variables |= {
        "cluster_name": cel.Type.STRING,
        "route_name": cel.Type.STRING,
        # Inside a map of any type the binding takes neither: as variables of
        # their own, whose names CEL finds before it looks into `request`.
        "request.time": cel.Type.TIMESTAMP,
        "request.duration": cel.Type.DURATION,
    }
    try:
        program = cel.NewEnv(variables=variables).compile(text)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"is not CEL: {' '.join(str(error).split())}") from None

    def evaluate(exchange: Exchange) -> Any:
        try:
            found = program.eval(data=_attributes(exchange))
        except (RuntimeError, ValueError, TypeError):
            return None
        if found.type() == cel.Type.ERROR:
            return None
        return found.plain_value()

    return evaluate


def _attributes(exchange: Exchange) -> dict[str, Any]:
    request, caller, destination = exchange.request, exchange.caller, exchange.destination
    found: dict[str, Any] = {
        "request": {
            "path": request.path,
            "url_path": request.path_only,
            "query": request.query,
            "host": request.authority,
            "scheme": request.scheme,
            "method": request.method,
            "headers": _map(request.headers),
            "id": exchange.request_id,
            "protocol": _PROTOCOLS.get(exchange.protocol, ""),
            "size": exchange.request_bytes,
            **_some("referer", request.headers.get("referer")),
            **_some("useragent", request.headers.get("user-agent")),
        },
        "response": {
            "size": exchange.response_bytes,
            "flags": flags_of(exchange),
            "code_details": exchange.detail,
        },
        "connection": {
            "mtls": caller.identity is not None,
            **_some("uri_san_peer_certificate", _shown(caller.identity)),
        },
        "source": {"address": str(caller.address), "port": caller.address.port},
        "destination": {
            "port": destination.port,
            **_some("address", _shown(destination.address)),
        },
        "upstream": _some("address", _shown(exchange.endpoint_address)),
        "cluster_name": exchange.endpoint_service.hostname if exchange.endpoint_service else "",
        "route_name": exchange.route,
        "request.time": datetime.fromtimestamp(exchange.started_wall_s, UTC),
        "request.duration": timedelta(seconds=max(0.0, exchange.ended_s - exchange.started_s)),
    }
    if exchange.response is not None:
        found["response"]["code"] = exchange.response.status
        found["response"]["headers"] = _map(exchange.response.headers)
    return found


def _map(headers: Headers) -> dict[str, str]:
    return {name: headers.get(name) or "" for name, _ in headers.items()}


def _some(name: str, value: str | None) -> dict[str, str]:
    return {} if value is None else {name: value}


def _shown(value: object) -> str | None:
    return None if value is None else str(value)
