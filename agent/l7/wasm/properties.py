"""The attributes that `proxy_get_property` knows (Envoy's, as far as they exist here).

Texts are their bytes, numbers eight bytes in little-endian order, truths one
byte; what is not known is not found.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from meshbpf.agent.core.address import SocketAddress
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.l7.exchange import Exchange, Protocol
from meshbpf.agent.l7.message import Headers

_INBOUND = 1  # envoy.config.core.v3.TrafficDirection
_PROTOCOLS = {Protocol.HTTP1: "HTTP/1.1", Protocol.HTTP2: "HTTP/2", Protocol.GRPC: "HTTP/2"}

Value = bytes | str | int | float | bool | SocketAddress | SpiffeId | None


def property_of(exchange: Exchange, path: list[str]) -> bytes | None:
    """The attribute at a path; None when there is none."""
    found: Value = None
    match path:
        case ["request", "headers", name]:
            found = _field(exchange.request.headers, name)
        case ["response", "headers", name] if exchange.response is not None:
            found = _field(exchange.response.headers, name)
        case ["response", "trailers", name] if exchange.response is not None:
            found = _field(exchange.response.trailers or Headers(), name)
        case _ if (read := _READERS.get(".".join(path))) is not None:
            found = read(exchange)
    return None if found is None else encode(found)


def encode(value: Value) -> bytes:
    """As a guest reads it."""
    match value:
        case bytes():
            return value
        case bool():
            return b"\1" if value else b"\0"
        case int():
            return struct.pack("<q", value)
        case float():
            return struct.pack("<d", value)
    return str(value).encode("utf-8", "replace")


def _field(headers: Headers, name: str) -> str | None:
    if name == "host":
        return headers.get("host")
    return headers.get(name.lower())


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


_READERS: dict[str, Callable[[Exchange], Value]] = {
    "request.path": lambda e: e.request.path,
    "request.url_path": lambda e: e.request.path_only,
    "request.query": lambda e: e.request.query,
    "request.host": lambda e: e.request.authority,
    "request.scheme": lambda e: e.request.scheme,
    "request.method": lambda e: e.request.method,
    "request.referer": lambda e: e.request.headers.get("referer"),
    "request.useragent": lambda e: e.request.headers.get("user-agent"),
    "request.id": lambda e: e.request_id or None,
    "request.protocol": lambda e: _PROTOCOLS.get(e.protocol),
    "request.time": lambda e: _nanoseconds(e.started_wall_s),
    "request.size": lambda e: e.request_bytes,
    "request.duration": lambda e: _nanoseconds(e.ended_s - e.started_s) if e.ended_s else None,
    "response.code": lambda e: e.response.status if e.response else None,
    "response.code_details": lambda e: e.detail or None,
    "response.flags": lambda e: ",".join(e.flags) or None,
    "response.size": lambda e: e.response_bytes,
    "source.address": lambda e: e.caller.address,
    "source.port": lambda e: e.caller.address.port,
    "destination.address": lambda e: e.destination.address,
    "destination.port": lambda e: e.destination.port,
    "connection.mtls": lambda e: e.caller.identity is not None,
    "connection.uri_san_peer_certificate": lambda e: e.caller.identity,
    "upstream.address": lambda e: e.endpoint_address,
    "route_name": lambda e: e.route or None,
    "cluster_name": lambda e: e.endpoint_service.hostname if e.endpoint_service else None,
    "listener_direction": lambda e: _INBOUND,
}
