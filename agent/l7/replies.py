"""Answers of the waypoint's own, in the form that the client's protocol has for them."""

from __future__ import annotations

from meshbpf.agent.l7.exchange import Protocol
from meshbpf.agent.l7.filter import Reply
from meshbpf.agent.l7.message import Headers, ResponseHead

# gRPC's status for an HTTP status (grpc/doc/http-grpc-status-mapping.md).
_GRPC = {400: 13, 401: 16, 403: 7, 404: 12, 429: 14, 502: 14, 503: 14, 504: 14}
_GRPC_UNKNOWN = 2


def reply_head(reply: Reply, protocol: Protocol) -> tuple[ResponseHead, bytes]:
    """Head and body of a Reply; for gRPC the status goes where gRPC clients look."""
    if protocol is Protocol.GRPC:
        status = _GRPC.get(reply.status, _GRPC_UNKNOWN)
        text = reply.body.decode("utf-8", "replace").strip() or reply.detail
        head = ResponseHead(200, Headers([(b"content-type", b"application/grpc")]))
        for name, value in reply.headers:
            head.headers.add(name, value)
        head.headers.add("grpc-status", str(status))
        head.headers.add("grpc-message", _percent_encoded(text))
        return head, b""
    head = ResponseHead(reply.status)
    for name, value in reply.headers:
        head.headers.add(name, value)
    if reply.body:
        if "content-type" not in head.headers:
            head.headers.add("content-type", "text/plain")
        head.headers.set("content-length", str(len(reply.body)))
    return head, reply.body


def _percent_encoded(text: str) -> str:
    """As gRPC over HTTP/2 has it: printable ASCII but the percent sign stands for itself."""
    return "".join(
        chr(byte) if 0x20 <= byte <= 0x7E and byte != 0x25 else f"%{byte:02X}"
        for byte in text.encode()
    )
