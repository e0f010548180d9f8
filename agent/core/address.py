"""IP addresses and sockets' addresses, in one canonical form.

An IPv4 address that the kernel shows as `::ffff:a.b.c.d` (a dual-stack
listener does) is IPv4 everywhere in meshbpf: policy and routing look
addresses up by equality, so two spellings of one address would be two hosts.
Scope ids (`fe80::1%3`) name an interface of one host and are dropped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
)
from typing import Any

from meshbpf.agent.core.errors import MeshbpfError

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network

_HOST_PORT = re.compile(r"(?:\[([0-9A-Fa-f:.]{2,45})\]|([0-9.]{7,15})):([0-9]{1,5})")


class AddressError(MeshbpfError):
    """A text that was meant to be an address and is none."""

    def __init__(self, what: str) -> None:
        super().__init__("bad-address", what)


def canonical_ip(address: IPAddress) -> IPAddress:
    """The one form of an address: IPv4-mapped IPv6 unmapped, scope id dropped."""
    if isinstance(address, IPv6Address):
        mapped = address.ipv4_mapped
        if mapped is not None:
            return mapped
        if address.scope_id is not None:
            return IPv6Address(int(address))
    return address


@lru_cache(maxsize=8192)
def parse_ip(text: str) -> IPAddress:
    """Read an address; AddressError if it is none. Cached: a node sees few peers, often."""
    try:
        return canonical_ip(ip_address(text))
    except ValueError:
        raise AddressError(f"{text!r} is not an IP address") from None


@lru_cache(maxsize=8192)
def ip_text(address: IPAddress) -> str:
    """`str(address)`, cached: formatting one IPv6 address costs as much as routing it."""
    return str(address)


@dataclass(frozen=True, slots=True)
class SocketAddress:
    """An IP address with a TCP port (0..65535)."""

    ip: IPAddress
    port: int

    def __str__(self) -> str:
        text = ip_text(self.ip)
        return f"{text}:{self.port}" if self.ip.version == 4 else f"[{text}]:{self.port}"

    @classmethod
    def parse(cls, text: str) -> SocketAddress:
        """Read `1.2.3.4:80` or `[::1]:80`; AddressError for anything else, names included."""
        found = _HOST_PORT.fullmatch(text)
        if found is None:
            raise AddressError(f"{text!r} is not IP:PORT")
        port = int(found[3])
        if port > 65535:
            raise AddressError(f"{text!r}: the port is above 65535")
        if found[1] is not None and ":" not in found[1]:
            raise AddressError(f"{text!r}: only IPv6 addresses stand in brackets")
        return cls(parse_ip(found[1] or found[2]), port)

    @classmethod
    def from_sockaddr(cls, sockaddr: tuple[Any, ...]) -> SocketAddress:
        """From what the socket module returns for AF_INET and AF_INET6."""
        host: str = sockaddr[0]
        return cls(parse_ip(host), sockaddr[1])


_V6 = 1 << 128


def address_bits(address: IPAddress) -> int:
    """The address as one integer, IPv6 told from IPv4 by bit 128.

    Dictionaries keyed by it are several times faster than by the address
    itself, whose `__hash__` and `__eq__` are Python code; a prefix of either
    family is a plain shift of it.
    """
    return int(address) if address.version == 4 else int(address) | _V6


def prefix_bits(network: IPNetwork) -> tuple[int, int]:
    """A prefix as (shift, value): it holds `a` when `address_bits(a) >> shift == value`."""
    shift = network.max_prefixlen - network.prefixlen
    return shift, address_bits(network.network_address) >> shift


PackedPrefix = int
"""A prefix as one integer: `address_bits` of its first address, then eight bits of length.

Sets of hundreds of thousands of prefixes are kept so: an IPv4Network takes
ten times the memory and hashes in Python code.
"""


def packed_host(address: IPAddress) -> PackedPrefix:
    """The prefix that holds one address alone."""
    return address_bits(address) << 8 | address.max_prefixlen


def packed_network(network: IPNetwork) -> PackedPrefix:
    """A prefix, packed."""
    return address_bits(network.network_address) << 8 | network.prefixlen


def unpacked(prefix: PackedPrefix) -> IPNetwork:
    """The reverse of both, for people."""
    bits, length = prefix >> 8, prefix & 0xFF
    if bits & _V6:
        return IPv6Network((bits ^ _V6, length))
    return IPv4Network((bits, length))
