"""Where keys may be fetched.

A URI in an object makes the waypoint send a request, so whoever may write the
object could reach what only this host, or the cloud's metadata service, can
(server-side request forgery; istiod had to be fixed for it, too). Such
addresses are refused here when they are written down, and by whoever performs
a `guarded` Call when a name turns out to mean one.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from urllib.parse import urlsplit

from meshbpf.agent.core.address import AddressError, IPAddress, SocketAddress, canonical_ip
from meshbpf.agent.core.authority import Authority, HostPort, parse_authority

_PORTS = {"http": 80, "https": 443}
_LOCAL_NAMES = ("localhost", "metadata", "metadata.google.internal", "instance-data")
# Metadata services that are not link-local: AWS over IPv6, Alibaba, Oracle.
_METADATA = (
    ip_address("fd00:ec2::254"),
    ip_address("100.100.100.200"),
    ip_address("192.0.0.192"),
)
# IPv4 in IPv6's clothes: NAT64 and 6to4 reach what their IPv4 part names.
_NAT64 = IPv6Network("64:ff9b::/96")


class UriError(ValueError):
    """Why a URI cannot be used."""


def refused_address(address: IPAddress) -> str:
    """Why nothing is fetched from an address; empty when it may be."""
    address = canonical_ip(address)
    if isinstance(address, IPv6Address):
        inner: IPv4Address | None = address.sixtofour
        if address in _NAT64:
            inner = IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return refused_address(inner)
    if address.is_loopback:
        return "is this host's own"
    if address in _METADATA or address.is_link_local:
        return "is link-local or a metadata service's"
    if address.is_unspecified or address.is_multicast:
        return "is no host's address"
    return ""


def read_uri(text: str) -> tuple[Authority, str, bool]:
    """(host and port, path with query, whether by TLS) of a URI; UriError."""
    try:
        parts = urlsplit(text)
        scheme, host, port = parts.scheme, parts.hostname, parts.port
    except ValueError:
        raise UriError("is not a URI") from None
    if scheme not in _PORTS or not host:
        raise UriError("is not an http:// or https:// URI")
    if parts.username is not None:
        raise UriError("carries a password")
    port = port or _PORTS[scheme]
    path = parts.path or "/"
    if parts.query:
        path = f"{path}?{parts.query}"
    try:
        address = ip_address(host)
    except ValueError:
        if host.rstrip(".") in _LOCAL_NAMES or host.endswith(".localhost"):
            raise UriError("names this host or a metadata service") from None
        try:
            named = parse_authority(f"{host}:{port}")
        except AddressError:
            raise UriError("has no usable host") from None
        if not isinstance(named, HostPort):
            raise UriError("has no usable host") from None
        return named, path, scheme == "https"
    if reason := refused_address(address):
        raise UriError(f"has an address that {reason}")
    return SocketAddress(canonical_ip(address), port), path, scheme == "https"
