"""Outbound routing answers what the slow model of the same rules allows, on any mesh."""

from __future__ import annotations

import random
from ipaddress import ip_network
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshbpf.agent.core.address import SocketAddress
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.route import HboneRoute, PlainRoute, Route
from meshbpf.agent.core.routing import outbound
from meshbpf.agent.core.service import (
    HealthPolicy,
    IPFamilies,
    LoadBalancerMode,
    LoadBalancerScope,
    LoadBalancing,
    NetworkCidr,
    Service,
    Visibility,
    WeightedWaypoint,
)
from meshbpf.agent.core.workload import (
    ApplicationTunnel,
    GatewayAddress,
    HealthStatus,
    Locality,
    NamespacedHostname,
    NetworkAddress,
    NetworkMode,
    TunnelFraming,
    TunnelProtocol,
    Workload,
)
from tests.unit.core.builders import at, ip, mesh
from tests.unit.core.slow_routing import Model, Outcome

T = TypeVar("T")

# Few of each, so that records meet.
NETWORKS = ["", "far"]
SPACES = ["a", "b"]
HOSTS = ["x", "y"]
POD_IPS = [ip(text) for text in ("10.0.0.1", "10.0.0.2", "fd00::1")]
VIPS = [ip(text) for text in ("10.9.0.1", "fd09::1", "10.0.0.2")]  # the last is a pod's as well
RANGES = [ip_network(text) for text in ("10.9.0.0/16", "10.9.0.0/24", "fd09::/32")]
SANS = [SpiffeId("cluster.local", "a", "one"), SpiffeId("cluster.local", "b", "two")]
TARGETS = [
    at(text)
    for text in (
        "10.0.0.1:80",
        "10.0.0.2:80",
        "[fd00::1]:80",
        "10.9.0.1:80",
        "10.9.0.1:81",
        "[fd09::1]:80",
        "10.9.0.7:80",
        "10.0.0.2:15008",
        "192.0.2.1:443",
        "127.0.0.1:80",
    )
]
NAMES = {"h": [ip("192.0.2.8"), ip("fd00::8")], "gone": []}


def few(values: st.SearchStrategy[T], most: int = 2) -> st.SearchStrategy[tuple[T, ...]]:
    return st.lists(values, max_size=most, unique_by=repr).map(tuple)


places = st.builds(NetworkAddress, st.sampled_from(NETWORKS), st.sampled_from(POD_IPS + VIPS))
keys = st.builds(NamespacedHostname, st.sampled_from(SPACES), st.sampled_from([*HOSTS, "h"]))
gateways = st.builds(GatewayAddress, places | keys, st.sampled_from([15008, 81]))
ports = st.dictionaries(st.sampled_from([80, 81, 15008]), st.sampled_from([0, 8080, 15006]))
own_ports = st.dictionaries(st.sampled_from([80, 15008]), st.sampled_from([9090, 15008]))


def none_or(values: st.SearchStrategy[T]) -> st.SearchStrategy[T | None]:
    return st.none() | values


def workload(index: int) -> st.SearchStrategy[Workload]:
    kind = "Pod" if index % 2 else "WorkloadEntry"
    return st.builds(
        Workload,
        uid=st.just(f"c//{kind}/{index}"),
        name=st.just(f"w{index}"),
        namespace=st.sampled_from(SPACES),
        addresses=few(st.sampled_from(POD_IPS)),
        network=st.sampled_from(["", *NETWORKS]),
        tunnel_protocol=st.sampled_from(TunnelProtocol),
        waypoint=none_or(gateways),
        node=st.sampled_from(["n", "m"]),
        status=st.sampled_from([HealthStatus.HEALTHY, *HealthStatus]),
        network_gateway=none_or(gateways),
        hostname=st.sampled_from(["", "h", "gone"]),
        services=st.dictionaries(keys, own_ports, max_size=2),
        application_tunnel=none_or(
            st.builds(
                ApplicationTunnel, st.sampled_from(TunnelFraming), st.sampled_from([None, 15088])
            )
        ),
        locality=st.builds(Locality, st.sampled_from("rs"), st.sampled_from("zy")),
        network_mode=st.sampled_from([NetworkMode.STANDARD, *NetworkMode]),
        capacity=st.sampled_from([0, 1, 7]),
    )


balancing = st.builds(
    LoadBalancing,
    few(st.sampled_from(LoadBalancerScope), 3),
    st.sampled_from(LoadBalancerMode),
    st.sampled_from(HealthPolicy),
)


def service(host: str, namespace: str) -> st.SearchStrategy[Service]:
    return st.builds(
        Service,
        name=st.just(host),
        namespace=st.just(namespace),
        hostname=st.just(host),
        addresses=few(
            st.builds(NetworkAddress, st.sampled_from(["", *NETWORKS]), st.sampled_from(VIPS))
        ),
        cidr_addresses=few(
            st.builds(NetworkCidr, st.sampled_from(NETWORKS), st.sampled_from(RANGES))
        ),
        ports=ports,
        subject_alt_names=few(st.sampled_from(SANS)),
        waypoint=none_or(gateways),
        weighted_waypoints=few(st.builds(WeightedWaypoint, gateways, st.sampled_from([0, 1, 5]))),
        load_balancing=none_or(balancing),
        ip_families=st.sampled_from(IPFamilies),
        canonical=st.booleans(),
        visibility=st.sampled_from(Visibility),
    )


workloads = st.tuples(*(workload(index) for index in range(4)))
services = st.lists(
    st.sampled_from([(h, n) for h in HOSTS for n in SPACES]), max_size=4, unique=True
).flatmap(lambda chosen: st.tuples(*(service(*each) for each in chosen)))


Pods = tuple[Workload, ...]
Known = tuple[Service, ...]
ANY_MESH = given(workloads, services, st.sampled_from(TARGETS), st.integers(0, 1000))


def meshes(number: int) -> settings:
    return settings(max_examples=number, deadline=None, suppress_health_check=list(HealthCheck))


def hold_to_the_rules(pods: Pods, known: Known, target: SocketAddress, seed: int) -> None:
    allowed = Model(pods, known, NAMES).outcomes(pods[0], target)
    rng, snapshot = random.Random(seed), mesh(*pods, *known)
    for _ in range(5):
        assert told(outbound(snapshot, pods[0], target, rng=rng, names=NAMES)) in allowed


@pytest.mark.compat
@meshes(80)
@ANY_MESH
def test_a_route_is_one_that_the_rules_allow(
    pods: Pods, known: Known, target: SocketAddress, seed: int
) -> None:
    hold_to_the_rules(pods, known, target, seed)


@pytest.mark.slow
@meshes(5000)
@ANY_MESH
def test_a_route_is_one_that_the_rules_allow_in_thousands_of_meshes(
    pods: Pods, known: Known, target: SocketAddress, seed: int
) -> None:
    hold_to_the_rules(pods, known, target, seed)


@pytest.mark.compat
@meshes(25)
@ANY_MESH
def test_chance_brings_every_route_that_the_rules_allow(
    pods: Pods, known: Known, target: SocketAddress, seed: int
) -> None:
    allowed = Model(pods, known, NAMES).outcomes(pods[0], target)
    rng, snapshot = random.Random(seed), mesh(*pods, *known)
    seen: set[Outcome] = set()
    for _ in range(20_000):  # the rarest has a chance of about one in a thousand
        seen.add(told(outbound(snapshot, pods[0], target, rng=rng, names=NAMES)))
        if seen == allowed:
            break
    assert seen == allowed


def told(route: Route) -> Outcome:
    match route:
        case HboneRoute():
            uid = route.destination.uid
            return ("hbone", str(route.gateway), route.authority, route.expected, route.inner, uid)
        case PlainRoute():
            return ("plain", str(route.target), route.destination and route.destination.uid)
        case _:
            return ("refused", route.code)
