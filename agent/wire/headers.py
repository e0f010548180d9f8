"""The header fields of HBONE: building ours, reading the peer's.

Names and forms are those that ztunnel sends and expects. A request is
judged here and not by the h2 library, so that a bad one costs its stream (400)
and not the whole tunnel.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshbpf.agent.core.address import SocketAddress
from meshbpf.agent.core.workload import Workload
from meshbpf.agent.wire.events import Headers

FORWARDED_NETWORK = b"x-forwarded-network"
_PSEUDO_OF_CONNECT = frozenset({b":method", b":authority"})
# RFC 9113, section 8.2.2; a content-length on CONNECT has no meaning
# (RFC 9110, section 8.6) and h2 would hold the tunnel's bytes against it.
_FORBIDDEN = frozenset(
    {
        b"connection",
        b"proxy-connection",
        b"keep-alive",
        b"transfer-encoding",
        b"upgrade",
        b"content-length",
    }
)


@dataclass(frozen=True, slots=True)
class RequestLine:
    """What a header list asks for. Missing pseudo-headers are empty."""

    method: bytes
    authority: bytes
    well_formed: bool


def read_request(headers: Headers) -> RequestLine:
    """Judge a request by RFC 9113, section 8.3 and 8.5."""
    pseudo: dict[bytes, bytes] = {}
    well_formed = True
    regular_seen = False
    for name, value in headers:
        if name.startswith(b":"):
            if regular_seen or name in pseudo:
                well_formed = False
            pseudo[name] = value
            continue
        regular_seen = True
        if name in _FORBIDDEN or name != name.lower() or not name:
            well_formed = False
    if pseudo.get(b":method") == b"CONNECT" and pseudo.keys() != _PSEUDO_OF_CONNECT:
        well_formed = False
    return RequestLine(
        method=pseudo.get(b":method", b""),
        authority=pseudo.get(b":authority", b""),
        well_formed=well_formed,
    )


def read_status(headers: Headers) -> int:
    """The status of a response, or 0 when there is none that can be read."""
    for name, value in headers:
        if name == b":status":
            return int(value) if len(value) == 3 and value.isdigit() else 0
    return 0


def connect_request(
    authority: str,
    baggage: bytes,
    source: SocketAddress,
    host: str | None,
    traceparent: bytes,
    network: str | None = None,
) -> Headers:
    """The request for one stream. `host` is the service's FQDN when one was dialed.

    `network` is our own, for the inner request of two: its receiver sees a
    gateway's address where the client's would be.
    """
    forwarded = f'for="{source}"' if host is None else f'for="{source}";host={host}'
    fields = (
        (b":method", b"CONNECT"),
        (b":authority", authority.encode()),
        (b"baggage", baggage),
        (b"forwarded", forwarded.encode()),
        (b"traceparent", traceparent),
    )
    return fields if network is None else (*fields, (FORWARDED_NETWORK, network.encode()))


def came_through_gateway(headers: Headers, network: str) -> bool:
    """Whether the request names another network than ours as its origin."""
    origin = find(headers, FORWARDED_NETWORK)
    return origin is not None and origin.lower() != network.lower().encode()


def response(status: int, baggage: bytes | None = None) -> Headers:
    """An answer; only a 200 carries our baggage."""
    line = (b":status", b"%d" % status)
    return (line,) if baggage is None else (line, (b"baggage", baggage))


_BAGGAGE_KEPT = 1024
_baggage: dict[int, tuple[Workload, bytes]] = {}
"""By the workload's id(), which is its own as long as it is held here: hashing one is slow."""


def baggage(workload: Workload) -> bytes:
    """Who a workload is, for the other side's telemetry. Never used for a decision."""
    known = _baggage.get(id(workload))
    if known is not None:
        return known[1]
    if len(_baggage) >= _BAGGAGE_KEPT:
        _baggage.clear()
    text = _spelled(workload)
    _baggage[id(workload)] = (workload, text)
    return text


def _spelled(workload: Workload) -> bytes:
    locality = workload.locality
    members = (
        ("k8s.cluster.name", workload.cluster_id),
        ("k8s.namespace.name", workload.namespace),
        (f"k8s.{workload.workload_type.lower() or 'pod'}.name", workload.workload_name),
        ("service.name", workload.canonical_name),
        ("service.version", workload.canonical_revision),
        ("cloud.region", locality.region),
        ("cloud.availability_zone", locality.zone),
    )
    text = ",".join(f"{name}={value}" for name, value in members if value)
    # A header value may hold visible ASCII and spaces; names from a mesh file
    # are longer-lived than our trust in them.
    if not (text.isascii() and text.isprintable()):
        text = "".join(each for each in text if " " <= each <= "~")
    return text.encode()


def traceparent(random_bytes: bytes) -> bytes:
    """A W3C trace context, version 00, from 24 random bytes; not sampled."""
    text = random_bytes.hex().encode()
    return b"00-%b-%b-00" % (text[:32], text[32:48])


def text(headers: Headers, name: bytes) -> str:
    """The first value of a field as text, "" when there is none; odd bytes are escaped."""
    value = find(headers, name)
    return "" if value is None else value.decode("ascii", "backslashreplace")


def forwarded_host(headers: Headers) -> str | None:
    """The `host` of the first element of `Forwarded` (RFC 7239): the service a client dialed."""
    for pair in text(headers, b"forwarded").split(",")[0].split(";"):
        name, equals, value = pair.strip().partition("=")
        if equals and name.lower() == "host":
            return value.strip('"')
    return None


def find(headers: Headers, name: bytes) -> bytes | None:
    """The first value of a field."""
    for each, value in headers:
        if each == name:
            return value
    return None
