"""Keys and values of the BPF maps as bytes; bpf/include/meshbpf/keys.h is the other side."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Final

from meshbpf.agent.core.address import PackedPrefix

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network

_V4_PREFIX: Final = bytes(10) + b"\xff\xff"
_V4_PREFIX_BITS: Final = 96
_GROUP_BITS: Final = 32
_V6_MASK: Final = (1 << 128) - 1


def u32(value: int) -> bytes:
    """A 32-bit key or value."""
    return struct.pack("I", value)


def u64(value: int) -> bytes:
    """A 64-bit key or value."""
    return struct.pack("Q", value)


def address(ip: IPAddress) -> bytes:
    """16 bytes: IPv6, or IPv4 mapped into ::ffff:0:0/96."""
    return ip.packed if ip.version == 6 else _V4_PREFIX + ip.packed


def read_address(raw: bytes) -> IPAddress:
    """The reverse of `address`; a mapped address comes out as IPv4."""
    return ip_address(raw[12:] if raw.startswith(_V4_PREFIX) else raw)


def pod_address(pod: int, ip: IPAddress) -> bytes:
    """Key of `addresses`."""
    return u32(pod) + address(ip)


def prefix(group: int, network: IPNetwork) -> bytes:
    """Key of the tries `mesh` (group 0) and `exempt_cidrs` (the pod's index)."""
    bits = network.prefixlen + (_V4_PREFIX_BITS if network.version == 4 else 0)
    return struct.pack("II", _GROUP_BITS + bits, group) + address(network.network_address)


def packed_prefix(group: int, packed: PackedPrefix) -> bytes:
    """The same key, from a packed prefix."""
    value, bits = packed >> 8, packed & 0xFF
    if value >> 128:
        return struct.pack("II", _GROUP_BITS + bits, group) + (value & _V6_MASK).to_bytes(16, "big")
    head = struct.pack("II", _GROUP_BITS + _V4_PREFIX_BITS + bits, group)
    return head + _V4_PREFIX + value.to_bytes(4, "big")


def read_prefix(raw: bytes) -> tuple[int, IPNetwork]:
    """The reverse of `prefix`: (group, network)."""
    bits, group = struct.unpack_from("II", raw)
    bits -= _GROUP_BITS
    packed = raw[8:]
    if packed.startswith(_V4_PREFIX) and bits >= _V4_PREFIX_BITS:
        return group, ip_network((packed[12:], bits - _V4_PREFIX_BITS))
    return group, ip_network((packed, bits))


def pod_number(pod: int, number: int) -> bytes:
    """Key of `exempt_ports` (a port) and `exempt_ifaces` (an index)."""
    return struct.pack("II", pod, number)


def listener(pod: int, role: int, family: int) -> bytes:
    """Key of `listeners`. `family` is AF_INET or AF_INET6."""
    return struct.pack("IHH", pod, role, family)


def pod_config(
    flags: int, cookie: int = 0, v4: IPAddress | None = None, v6: IPAddress | None = None
) -> bytes:
    """Value of `pod_config`: the pod's netns and its first address of each family."""
    sources = (bytes(16) if ip is None else address(ip) for ip in (v4, v6))
    return struct.pack("IIQ", flags, 0, cookie) + b"".join(sources)


@dataclass(frozen=True, slots=True)
class PodCounters:
    """Value of `pod_counters`, summed over CPUs; what passed the host's end of the veth."""

    from_pod_packets: int
    from_pod_bytes: int
    to_pod_packets: int
    to_pod_bytes: int
    spoofed_packets: int


def sum_pod_counters(raw: bytes) -> PodCounters:
    """From the per-CPU values as one lookup returns them."""
    rows = list(struct.iter_unpack("5Q", raw))
    return PodCounters(*(sum(column) for column in zip(*rows, strict=True)))


def sum_u64(raw: bytes) -> int:
    """The sum of per-CPU 64-bit counters."""
    return sum(value for (value,) in struct.iter_unpack("Q", raw))


FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)
