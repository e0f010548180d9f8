"""Connections to another network: a tunnel to its gateway, and one inside that."""

from __future__ import annotations

from typing import Any

import pytest

from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.route import HboneRoute, Refused
from meshbpf.agent.core.routing import outbound
from tests.unit.core.builders import at, gateway, mesh, pod, rng, service

pytestmark = pytest.mark.compat

SOURCE = pod("src", "10.0.0.1", "fd00::1")
SAN = SpiffeId.parse("spiffe://cluster.local/ns/default/sa/web")
GATE_SAN = SpiffeId.parse("spiffe://cluster.local/ns/default/sa/gates")
GATE = pod("gate", "10.7.0.1", "fd07::1", network="far", services={"gate": {}}, hostname="gate.h")
GATE_SERVICE = service("gate", "far/10.7.9.9", ports={15008: 15010}, subject_alt_names=(GATE_SAN,))
FAR = pod("far", network="far", services={"web": {}}, network_gateway=gateway("far/10.7.0.1"))
WEB = service("web", "10.9.0.1", "fd09::1", subject_alt_names=(SAN,))


def go(target: str, *records: Any, source: Any = SOURCE) -> Any:
    return outbound(mesh(SOURCE, GATE, GATE_SERVICE, *records), source, at(target), rng=rng())


def test_a_far_endpoint_is_reached_by_two_tunnels_that_ask_for_the_service_by_name() -> None:
    route = go("10.9.0.1:80", FAR, WEB)
    assert isinstance(route, HboneRoute), route
    assert str(route.gateway) == "10.7.0.1:15008"
    assert route.authority == "web:80"
    assert route.destination is GATE
    assert route.service is WEB
    assert str(route.target) == "10.9.0.1:80"


def test_the_outer_tunnel_wants_the_gateways_identity_the_inner_one_the_services_alone() -> None:
    route = go("10.9.0.1:80", FAR, WEB)
    assert isinstance(route, HboneRoute), route
    assert route.expected == {GATE.identity}
    assert route.inner == {SAN}


def test_within_one_network_there_is_one_tunnel_even_if_the_workload_has_a_gateway() -> None:
    near = pod("near", "10.0.0.2", services={"web": {}}, network_gateway=gateway("far/10.7.0.1"))
    route = go("10.9.0.1:80", near, WEB)
    assert isinstance(route, HboneRoute), route
    assert (str(route.gateway), route.inner) == ("10.0.0.2:15008", None)


def test_without_an_identity_of_the_service_there_is_no_way() -> None:
    route = go("10.9.0.1:80", FAR, service("web", "10.9.0.1"))
    assert isinstance(route, Refused)
    assert route.code == "no-identity"


GATEWAYS = [
    # how the far workload names its gateway, dialed for an IPv4 and for an IPv6 client
    ("far/10.7.0.1", "10.7.0.1:15008", "10.7.0.1:15008"),
    ("far/fd07::1", "[fd07::1]:15008", "[fd07::1]:15008"),
    ("far/10.7.9.9", "10.7.0.1:15010", "10.7.0.1:15010"),
    ("default/gate", "10.7.0.1:15010", "[fd07::1]:15010"),
    ("default/gate.h", "10.7.0.1:15008", "[fd07::1]:15008"),
]


@pytest.mark.parametrize(("reference", "by_ipv4", "by_ipv6"), GATEWAYS)
def test_gateways_are_found_by_address_and_by_name(
    reference: str, by_ipv4: str, by_ipv6: str
) -> None:
    far = pod("far", network="far", services={"web": {}}, network_gateway=gateway(reference))
    assert str(go("10.9.0.1:80", far, WEB).gateway) == by_ipv4
    assert str(go("[fd09::1]:80", far, WEB).gateway) == by_ipv6


def test_a_gateway_behind_a_service_may_prove_the_services_identity() -> None:
    far = pod("far", network="far", services={"web": {}}, network_gateway=gateway("default/gate"))
    assert go("10.9.0.1:80", far, WEB).expected == {GATE.identity, GATE_SAN}


NO_GATEWAY = [
    ("default/gone", ()),
    ("far/10.7.0.9", ()),
    ("default/empty", (service("empty", ports={15008: 1}),)),
    ("default/portless", (service("portless"), pod("p", "10.7.0.3", services={"portless": {}}))),
]


@pytest.mark.parametrize(("reference", "records"), NO_GATEWAY)
def test_an_unusable_gateway_is_never_gone_round(reference: str, records: Any) -> None:
    far = pod(
        "far",
        "10.0.0.9",
        network="far",
        services={"web": {}},
        network_gateway=gateway(reference),
    )
    route = go("10.9.0.1:80", far, WEB, *records)
    assert isinstance(route, Refused)
    assert route.code == "no-gateway"
    assert reference in route.reason


def test_a_far_endpoint_without_gateway_is_not_picked() -> None:
    far = pod("far", "10.0.0.9", network="far", services={"web": {}})
    route = go("10.9.0.1:80", far, WEB)
    assert isinstance(route, Refused)
    assert route.code == "no-endpoint"


def test_a_waypoint_on_another_network_is_reached_through_the_gateway() -> None:
    waypoint = pod(
        "wp", network="far", services={"wp": {}}, network_gateway=gateway("far/10.7.0.1")
    )
    behind = service("wp", ports={15008: 15008}, subject_alt_names=(GATE_SAN,))
    web = service("web", "10.9.0.1", subject_alt_names=(SAN,), waypoint=gateway("default/wp"))
    route = go("10.9.0.1:80", waypoint, behind, web)
    assert isinstance(route, HboneRoute), route
    # The service's name also here, not the waypoint's: it is the same to the gateway.
    assert route.authority == "web:80"
    assert (route.destination, route.expected) == (GATE, {GATE.identity})
    assert route.inner == {GATE_SAN}  # the waypoint's, which the inner tunnel ends at


def test_a_workloads_waypoint_on_another_network_is_not_reached() -> None:
    waypoint = pod("wp", "10.7.0.5", network="far", network_gateway=gateway("far/10.7.0.1"))
    guarded = pod("a", "10.0.0.2", waypoint=gateway("far/10.7.0.5"))
    route = go("10.0.0.2:80", waypoint, guarded)
    assert isinstance(route, Refused)
    assert (route.code, "only services" in route.reason) == ("other-network", True)
