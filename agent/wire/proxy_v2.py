"""The PROXY header, version 2: who a connection is from, told ahead of its bytes.

Format: https://www.haproxy.org/download/2.8/doc/proxy-protocol.txt, section 2.2.
An app with an application tunnel reads one before anything else. The client's
identity goes with it in Istio's own TLV, which Envoy's and Istio's waypoints read.
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address

from meshbpf.agent.core.address import IPAddress, SocketAddress
from meshbpf.agent.core.identity import SpiffeId

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
TLV_AUTHORITY = 0xD0
"""The peer's SPIFFE id; PROXY_PROTOCOL_AUTHORITY_TLV of ztunnel's src/proxy.rs."""
_V2_PROXY = 0x21
_TCP_OVER_IPV4 = 0x11
_TCP_OVER_IPV6 = 0x21


def header(source: SocketAddress, target: SocketAddress, identity: SpiffeId | None) -> bytes:
    """What to send first; `target` is the address that the client wanted.

    The header has one address family. When the two differ, as they may for a
    client that came in by IPv6 for an IPv4 service, the IPv4 one is written
    as `::ffff:a.b.c.d`.
    """
    if source.ip.version == target.ip.version == 4:
        family, addresses = _TCP_OVER_IPV4, source.ip.packed + target.ip.packed
    else:
        family, addresses = _TCP_OVER_IPV6, _as_v6(source.ip) + _as_v6(target.ip)
    told = b"" if identity is None else str(identity).encode()
    tlv = b"" if identity is None else struct.pack("!BH", TLV_AUTHORITY, len(told)) + told
    body = addresses + struct.pack("!HH", source.port, target.port) + tlv
    return SIGNATURE + struct.pack("!BBH", _V2_PROXY, family, len(body)) + body


def _as_v6(ip: IPAddress) -> bytes:
    if isinstance(ip, IPv4Address):
        ip = IPv6Address(b"\0" * 10 + b"\xff\xff" + ip.packed)
    return ip.packed
