"""What a port speaks: by `appProtocol`, by the port's name, or by the first bytes.

Istio's names for both. Only where neither says anything are bytes looked at,
for a protocol in which the server speaks first would wait for ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meshbpf.agent.core.objects import KubeObject
from meshbpf.agent.l7.exchange import Protocol

_NAMES = {
    "http": Protocol.HTTP1,
    "ws": Protocol.HTTP1,
    "kubernetes.io/ws": Protocol.HTTP1,
    "http2": Protocol.HTTP2,
    "h2c": Protocol.HTTP2,
    "kubernetes.io/h2c": Protocol.HTTP2,
    "grpc": Protocol.HTTP2,
    "grpc-web": Protocol.HTTP1,
    # TLS from end to end, or not HTTP at all: carried as it is.
    "https": Protocol.TCP,
    "tls": Protocol.TCP,
    "kubernetes.io/wss": Protocol.TCP,
    "tcp": Protocol.TCP,
    "mongo": Protocol.TCP,
    "mysql": Protocol.TCP,
    "redis": Protocol.TCP,
}

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_METHODS = (
    b"GET ",
    b"HEAD ",
    b"POST ",
    b"PUT ",
    b"DELETE ",
    b"OPTIONS ",
    b"PATCH ",
    b"TRACE ",
    b"CONNECT ",
)
SNIFF_BYTES = max(len(each) for each in (*_METHODS, PREFACE))


def declared(service: KubeObject) -> dict[int, Protocol]:
    """The declared protocols of a Service's ports."""
    found: dict[int, Protocol] = {}
    for port in _ports(service):
        protocol = _of(port)
        number = port.get("port")
        if protocol is not None and isinstance(number, int):
            found[number] = protocol
    return found


def declared_by_entry(entry: KubeObject) -> dict[int, Protocol]:
    """The declared protocols of a ServiceEntry's ports, which say nothing by their names."""
    found: dict[int, Protocol] = {}
    for port in _ports(entry):
        number, name = port.get("number"), str(port.get("protocol") or "").lower()
        if name and isinstance(number, int):
            found[number] = _NAMES.get(name, Protocol.TCP)
    return found


def _ports(owner: KubeObject) -> list[Mapping[str, Any]]:
    """None of an object that is malformed: it is refused, and told, where mesh state is made."""
    listed = owner.spec.get("ports")
    found = listed if isinstance(listed, list) else []
    return [each for each in found if isinstance(each, Mapping)]


def _of(port: Mapping[str, Any]) -> Protocol | None:
    app = port.get("appProtocol")
    if app:
        # A name that we do not know is still a word against guessing.
        return _NAMES.get(str(app).lower(), Protocol.TCP)
    name = str(port.get("name") or "").lower()
    return _NAMES.get(name) or _NAMES.get(name.partition("-")[0])


def sniff(head: bytes) -> Protocol | None:
    """What a stream speaks that begins so; None: more bytes are needed."""
    if head.startswith(PREFACE):
        return Protocol.HTTP2
    if head.startswith(_METHODS):
        return Protocol.HTTP1
    if any(each.startswith(head) for each in (*_METHODS, PREFACE)):
        return None
    return Protocol.TCP
