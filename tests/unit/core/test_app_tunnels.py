"""Pods whose app takes connections on one port, each behind a PROXY header."""

from __future__ import annotations

from typing import Any

import pytest

from meshbpf.agent.core.route import InboundRoute, Refused
from meshbpf.agent.core.routing import inbound_hbone
from meshbpf.agent.core.workload import ApplicationTunnel, TunnelFraming
from tests.unit.core.builders import ip, mesh, pod, service

pytestmark = pytest.mark.compat

PROXY = ApplicationTunnel(TunnelFraming.PROXY, 15088)


def go(authority: str, tunnel: ApplicationTunnel = PROXY, *more: Any) -> Any:
    local = pod("wp", "10.0.0.9", "fd00::9", services={"wp": {}}, application_tunnel=tunnel)
    snapshot = mesh(
        local,
        service("web", "far/10.9.0.2", "10.9.0.1", "fd09::1", ports={80: 8080}),
        service("six", "fd09::6", ports={80: 8080}),
        service("named-only", ports={80: 8080}),
        *more,
    )
    return inbound_hbone(
        snapshot, local, frozenset(local.addresses), authority, arrived_at=ip("10.0.0.9")
    )


def test_the_tunnels_port_is_dialed_over_loopback_and_judged_at_the_pods_address() -> None:
    route = go("10.0.0.9:80")
    assert isinstance(route, InboundRoute)
    assert (str(route.target), str(route.dialed)) == ("10.0.0.9:15088", "127.0.0.1:15088")


def test_the_app_is_told_the_address_that_was_wanted_whatever_it_is() -> None:
    for wanted in ("10.0.0.9:80", "10.9.0.1:443", "[fd09::1]:80", "8.8.8.8:53"):
        route = go(wanted)
        assert isinstance(route, InboundRoute)
        assert str(route.proxied) == wanted
        assert str(route.target) == "10.0.0.9:15088"


def test_ipv6_is_dialed_at_ipv6s_loopback() -> None:
    assert str(go("[fd00::9]:80").dialed) == "[::1]:15088"


@pytest.mark.parametrize(
    ("authority", "told"),
    [
        ("web:80", "10.9.0.1:80"),  # our network's address, IPv4's, and the service's own port
        ("six:80", "[fd09::6]:80"),
    ],
)
def test_a_hostname_is_told_as_the_services_address(authority: str, told: str) -> None:
    assert str(go(authority).proxied) == told


def test_a_hostname_whose_service_has_no_address_cannot_be_told() -> None:
    route = go("named-only:80")
    assert isinstance(route, Refused)
    assert (route.status, route.code) == (503, "no-address")


def test_without_a_port_of_its_own_the_tunnel_takes_the_asked_one() -> None:
    route = go("10.0.0.9:8080", ApplicationTunnel(TunnelFraming.PROXY))
    assert isinstance(route, InboundRoute)
    assert str(route.dialed) == "127.0.0.1:8080"


def test_without_framing_only_the_port_changes() -> None:
    route = go("10.9.0.1:80", ApplicationTunnel(TunnelFraming.NONE, 15088))
    assert isinstance(route, InboundRoute)
    assert (str(route.dialed), route.proxied) == ("10.0.0.9:15088", None)


def test_internal_ports_are_refused_before_the_tunnels_port_takes_their_place() -> None:
    for port in (15001, 15006, 15008):
        route = go(f"10.0.0.9:{port}")
        assert isinstance(route, Refused)
        assert (route.status, route.code) == (503, "internal-port")
