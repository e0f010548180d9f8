"""Connections that go through a waypoint, or must not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.routing import (
    HboneRoute,
    InboundRoute,
    PlainRoute,
    Refused,
    inbound_hbone,
    outbound,
)
from meshbpf.agent.core.service import LoadBalancerMode, LoadBalancing, WeightedWaypoint
from tests.unit.core.builders import at, gateway, ip, mesh, plain, pod, rng, service

pytestmark = pytest.mark.compat

SOURCE = pod("src", "10.0.0.1", "fd00::1")
WAYPOINT = pod("wp", "10.0.2.1", "fd00::21", services={"wp.local": {15008: 15008}}, hostname="wp.h")
WAYPOINT_SERVICE = service("wp.local", "10.9.2.1", ports={15008: 15008})
SAN = SpiffeId.parse("spiffe://cluster.local/ns/default/sa/waypoints")


def go(target: str, *records: Any, source: Any = SOURCE) -> Any:
    snapshot = mesh(SOURCE, WAYPOINT, WAYPOINT_SERVICE, *records)
    return outbound(snapshot, source, at(target), rng=rng())


@pytest.mark.parametrize(
    "reference",
    ["default/wp.local", "default/wp.h", "/10.9.2.1", "/10.0.2.1"],
    ids=["service host", "workload host", "service address", "workload address"],
)
def test_service_goes_to_its_waypoint_with_the_vip_as_authority(reference: str) -> None:
    web = service("web", "10.9.0.1", waypoint=gateway(reference))
    route = go("10.9.0.1:80", web, pod("a", "10.0.0.2", services={"web": {}}))
    assert isinstance(route, HboneRoute), route
    assert str(route.gateway) == "10.0.2.1:15008"
    assert route.authority == "10.9.0.1:80"
    assert route.expected == {WAYPOINT.identity}
    assert route.destination is WAYPOINT
    assert route.service is web


def test_waypoint_named_by_host_is_dialed_in_the_clients_family() -> None:
    web = service("web", "fd09::1", waypoint=gateway("default/wp.local"))
    assert str(go("[fd09::1]:80", web).gateway) == "[fd00::21]:15008"


def test_waypoint_named_by_address_is_dialed_there() -> None:
    web = service("web", "fd09::1", waypoint=gateway("/10.0.2.1"))
    assert str(go("[fd09::1]:80", web).gateway) == "10.0.2.1:15008"


def test_waypoint_port_is_taken_through_its_service() -> None:
    wp = pod("other", "10.0.2.2", services={"moved": {15008: 16000}})
    moved = service("moved", ports={15008: 0}, subject_alt_names=(SAN,))
    web = service("web", "10.9.0.1", waypoint=gateway("default/moved"))
    route = go("10.9.0.1:80", wp, moved, web)
    assert isinstance(route, HboneRoute)
    assert str(route.gateway) == "10.0.2.2:16000"
    assert route.expected == {wp.identity, SAN}


def test_waypoint_port_of_a_workload_is_as_given() -> None:
    web = service("web", "10.9.0.1", waypoint=gateway("/10.0.2.1", 16000))
    assert str(go("10.9.0.1:80", web).gateway) == "10.0.2.1:16000"


@pytest.mark.parametrize("make", [pod, plain])
def test_workload_behind_a_waypoint_is_reached_through_it(make: Any) -> None:
    guarded = make("a", "10.0.0.2", waypoint=gateway("default/wp.local"))
    route = go("10.0.0.2:8080", guarded)
    assert isinstance(route, HboneRoute)
    assert str(route.gateway) == "10.0.2.1:15008"
    assert route.authority == "10.0.0.2:8080"
    assert route.service is None


def test_workloads_waypoint_does_not_matter_when_its_service_was_addressed() -> None:
    guarded = pod("a", "10.0.0.2", services={"web": {}}, waypoint=gateway("default/wp.local"))
    route = go("10.9.0.1:80", guarded, service("web", "10.9.0.1"))
    assert isinstance(route, HboneRoute)
    assert route.authority == "10.0.0.2:8080"
    assert str(route.gateway) == "10.0.0.2:15008"


@pytest.mark.parametrize("reference", ["default/wp.local", "default/wp.h", "/10.0.2.1"])
def test_a_waypoint_does_not_go_through_itself(reference: str) -> None:
    guarded = pod("a", "10.0.0.2", services={"web": {}}, waypoint=gateway(reference))
    web = service("web", "10.9.0.1", waypoint=gateway(reference))
    for target in ("10.0.0.2:8080", "10.9.0.1:80"):
        route = go(target, guarded, web, source=WAYPOINT)
        assert isinstance(route, HboneRoute)
        assert str(route.gateway) == "10.0.0.2:15008"


NO_WAYPOINT = [
    ("default/gone", ()),
    ("/10.0.9.9", ()),
    ("default/empty", (service("empty", ports={15008: 15008}),)),
    ("default/portless", (service("portless"), pod("p", "10.0.2.3", services={"portless": {}}))),
    (
        "default/pass",
        (
            service(
                "pass",
                ports={15008: 1},
                load_balancing=LoadBalancing(mode=LoadBalancerMode.PASSTHROUGH),
            ),
            pod("behind", "10.0.2.4", services={"pass": {}}),
        ),
    ),
]


@pytest.mark.parametrize(("reference", "records"), NO_WAYPOINT)
def test_unusable_waypoint_is_never_gone_round(reference: str, records: Any) -> None:
    web = service("web", "10.9.0.1", waypoint=gateway(reference))
    backend = pod("a", "10.0.0.2", services={"web": {}})
    for route in (
        go("10.9.0.1:80", web, backend, *records),
        go("10.0.0.7:80", pod("g", "10.0.0.7", waypoint=gateway(reference)), *records),
    ):
        assert isinstance(route, Refused)
        assert route.code == "no-waypoint"
        assert reference in route.reason


def test_address_that_a_workload_has_too_counts_as_the_workloads() -> None:
    """The service still picks the endpoint; its waypoint is for those who addressed it alone."""
    web = service("web", "10.0.0.2", waypoint=gateway("default/gone"))
    backend = pod("a", "10.0.0.2", services={"web": {}}, waypoint=gateway("default/wp.local"))
    route = go("10.0.0.2:80", web, backend)
    assert isinstance(route, HboneRoute)
    assert str(route.gateway) == "10.0.2.1:15008"
    assert route.authority == "10.0.0.2:80"


def test_weighted_waypoints_share_connections_by_weight() -> None:
    other = pod("wp2", "10.0.2.2")
    web = service(
        "web",
        "10.9.0.1",
        waypoint=gateway("/10.0.2.1"),
        weighted_waypoints=(
            WeightedWaypoint(gateway("/10.0.2.1"), 9),
            WeightedWaypoint(gateway("/10.0.2.2"), 1),
        ),
    )
    snapshot, random = mesh(SOURCE, WAYPOINT, other, web), rng()
    count = Counter[str]()
    for _ in range(2000):
        route = outbound(snapshot, SOURCE, at("10.9.0.1:80"), rng=random)
        assert isinstance(route, HboneRoute)
        count[route.destination.name] += 1
    assert 0.86 < count["wp"] / 2000 < 0.94


def test_weights_that_sum_to_nothing_leave_the_single_waypoint() -> None:
    web = service(
        "web",
        "10.9.0.1",
        waypoint=gateway("/10.0.2.1"),
        weighted_waypoints=(WeightedWaypoint(gateway("/10.0.2.2"), 0),),
    )
    assert go("10.9.0.1:80", web, pod("wp2", "10.0.2.2")).destination is WAYPOINT


def test_waypoint_comes_before_passthrough() -> None:
    passing = LoadBalancing(mode=LoadBalancerMode.PASSTHROUGH)
    web = service("web", "10.9.0.1", load_balancing=passing, waypoint=gateway("default/wp.local"))
    assert isinstance(go("10.9.0.1:80", web), HboneRoute)
    assert isinstance(
        go("10.9.0.2:80", service("p", "10.9.0.2", load_balancing=passing)), PlainRoute
    )


@pytest.mark.parametrize(
    ("authority", "taken"),
    [
        ("10.9.0.1:80", True),  # a service that has it as its waypoint
        ("10.0.0.2:80", True),  # a workload that has
        ("10.9.0.3:80", True),  # one of several, by weight
        ("10.9.0.4:80", False),
        ("10.0.0.3:80", False),
    ],
)
def test_inbound_authority_that_a_waypoint_stands_for(authority: str, taken: bool) -> None:
    here = gateway("default/wp.local")
    snapshot = mesh(
        WAYPOINT,
        WAYPOINT_SERVICE,
        service("web", "10.9.0.1", waypoint=here),
        service("many", "10.9.0.3", weighted_waypoints=(WeightedWaypoint(here, 1),)),
        service("free", "10.9.0.4"),
        pod("a", "10.0.0.2", waypoint=here),
        pod("b", "10.0.0.3"),
    )
    route = inbound_hbone(
        snapshot, WAYPOINT, frozenset(WAYPOINT.addresses), authority, arrived_at=ip("10.0.2.1")
    )
    if taken:
        assert isinstance(route, InboundRoute)
        assert str(route.target) == "10.0.2.1:80"  # itself, whatever was asked
    else:
        assert isinstance(route, Refused)
        assert route.status == 400
