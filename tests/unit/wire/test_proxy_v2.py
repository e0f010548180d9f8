"""The PROXY header, read here by a few lines of our own after its specification."""

from __future__ import annotations

import struct

import pytest

from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.wire.proxy_v2 import header
from tests.unit.core.builders import at, ip

pytestmark = pytest.mark.compat

WEB = SpiffeId("cluster.local", "shop", "web")


def read(data: bytes) -> tuple[int, str, str, dict[int, bytes]]:
    assert data[:12] == b"\x0d\x0a\x0d\x0a\x00\x0d\x0a\x51\x55\x49\x54\x0a"
    command, family, length = struct.unpack("!BBH", data[12:16])
    assert command == 0x21, "version 2, PROXY"
    body = data[16:]
    assert len(body) == length
    width = {0x11: 4, 0x21: 16}[family]
    ports = struct.unpack("!HH", body[2 * width : 2 * width + 4])
    ends = [
        f"{int.from_bytes(part, 'big'):0{2 * width}x}:{port}"
        for part, port in zip((body[:width], body[width : 2 * width]), ports, strict=True)
    ]
    rest, found = body[2 * width + 4 :], {}
    while rest:
        kind, size = struct.unpack("!BH", rest[:3])
        found[kind] = rest[3 : 3 + size]
        rest = rest[3 + size :]
    return family, ends[0], ends[1], found


def spelt(text: str, width: int = 4) -> str:
    address = at(text)
    return f"{int(address.ip):0{2 * width}x}:{address.port}"


def test_addresses_ports_and_the_identity_in_istios_tlv() -> None:
    seen = read(header(at("10.0.0.1:40000"), at("10.9.0.1:80"), WEB))
    assert seen == (
        0x11,
        spelt("10.0.0.1:40000"),
        spelt("10.9.0.1:80"),
        {0xD0: b"spiffe://cluster.local/ns/shop/sa/web"},
    )


def test_ipv6() -> None:
    family, source, target, _ = read(header(at("[fd00::1]:1"), at("[fd09::1]:65535"), WEB))
    assert (family, source, target) == (
        0x21,
        spelt("[fd00::1]:1", 16),
        spelt("[fd09::1]:65535", 16),
    )


def test_mixed_families_are_both_written_as_ipv6() -> None:
    family, source, target, _ = read(header(at("10.0.0.1:1"), at("[fd09::1]:2"), WEB))
    assert (family, target) == (0x21, spelt("[fd09::1]:2", 16))
    assert int(source.split(":")[0], 16) == int(ip("fd00::")) & 0 | 0xFFFF0A000001


def test_a_client_without_identity_has_no_tlv() -> None:
    assert read(header(at("10.0.0.1:1"), at("10.9.0.1:2"), None))[3] == {}
