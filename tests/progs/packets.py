"""Packets by hand, for what no stack would send."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address, ip_address

SYN, ACK = 2, 16


def checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def tcp(
    source: str,
    destination: str,
    flags: int = SYN,
    *,
    ports: tuple[int, int] = (40000, 80),
    sequence: int = 1,
) -> bytes:
    a, b = ip_address(source).packed, ip_address(destination).packed
    segment = struct.pack("!HHIIBBHHH", *ports, sequence, 0, 0x50, flags, 1000, 0, 0)
    pseudo = a + b + struct.pack("!II", len(segment), 6)
    return segment[:16] + struct.pack("!H", checksum(pseudo + segment)) + segment[18:]


def ipv4(
    source: str, destination: str, payload: bytes, *, fragment: int = 0, kind: int = 6
) -> bytes:
    header = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 7, fragment, 64, kind, 0,
        IPv4Address(source).packed, IPv4Address(destination).packed,
    )  # fmt: skip
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + payload


def ipv6(source: str, destination: str, payload: bytes, *, kind: int = 6) -> bytes:
    addresses = IPv6Address(source).packed + IPv6Address(destination).packed
    return struct.pack("!IHBB", 6 << 28, len(payload), kind, 64) + addresses + payload
