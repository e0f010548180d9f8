"""Addresses have one form, and their text goes there and back."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshbpf.agent.core.address import (
    AddressError,
    SocketAddress,
    address_bits,
    canonical_ip,
    prefix_bits,
)

addresses = st.ip_addresses().map(canonical_ip)
ports = st.integers(0, 65535)


@given(addresses, ports)
def test_socket_address_survives_its_text(ip: IPv4Address | IPv6Address, port: int) -> None:
    address = SocketAddress(ip, port)
    assert SocketAddress.parse(str(address)) == address


@given(st.text(alphabet="0123456789abcdef:.[]% ", max_size=30) | st.text(max_size=30))
def test_parse_raises_only_address_error(text: str) -> None:
    try:
        parsed = SocketAddress.parse(text)
    except AddressError:
        return
    assert SocketAddress.parse(str(parsed)) == parsed


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("1.2.3.4:80", "1.2.3.4:80"),
        ("[::1]:443", "[::1]:443"),
        ("[FD00:0:0::1]:1", "[fd00::1]:1"),
        ("[::ffff:10.0.0.1]:80", "10.0.0.1:80"),
        ("1.2.3.4:0", "1.2.3.4:0"),
    ],
)
def test_accepted_forms(text: str, want: str) -> None:
    assert str(SocketAddress.parse(text)) == want


@pytest.mark.parametrize(
    "text",
    [
        "", "1.2.3.4", "1.2.3.4:", ":80", "1.2.3.4:65536", "1.2.3.4:-1", "1.2.3.4:+1",
        "1.2.3.4:80 ", " 1.2.3.4:80", "1.2.3.4:8_0", "1.2.3:80", "256.1.1.1:80", "::1:80",
        "[::1]", "[1.2.3.4]:80", "[fe80::1%eth0]:80", "host:80", "1.2.3.4:\u0661",
        "01.2.3.4:80", "[::1]:80\n",
    ],
)  # fmt: skip
def test_refused_forms(text: str) -> None:
    with pytest.raises(AddressError) as caught:
        SocketAddress.parse(text)
    assert caught.value.code == "bad-address"


@pytest.mark.parametrize(
    ("sockaddr", "want"),
    [
        (("10.0.0.1", 80), "10.0.0.1:80"),
        (("::ffff:10.0.0.1", 80, 0, 0), "10.0.0.1:80"),
        (("fe80::1%3", 80, 0, 3), "[fe80::1]:80"),
        (("fd00::1", 80, 7, 0), "[fd00::1]:80"),
    ],
)
def test_kernel_addresses_become_canonical(sockaddr: tuple[object, ...], want: str) -> None:
    assert str(SocketAddress.from_sockaddr(sockaddr)) == want


@given(st.ip_addresses(), st.ip_addresses())
def test_bits_tell_addresses_apart_across_families(
    one: IPv4Address | IPv6Address, other: IPv4Address | IPv6Address
) -> None:
    assert (address_bits(one) == address_bits(other)) == (one == other)


@given(st.ip_addresses(), st.ip_addresses(), st.integers(0, 128))
def test_prefix_bits_hold_what_the_network_holds(
    base: IPv4Address | IPv6Address, probe: IPv4Address | IPv6Address, length: int
) -> None:
    network: IPv4Network | IPv6Network = ip_network(
        f"{base}/{min(length, base.max_prefixlen)}", strict=False
    )
    shift, value = prefix_bits(network)
    # The last address of the network is in it, whatever the drawn probe is.
    for ip in (probe, base, ip_address(str(network.broadcast_address))):
        assert (address_bits(ip) >> shift == value) == (ip in network)
