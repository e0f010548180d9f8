"""Which endpoint is taken: reach, ports, locality, capacity."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from meshbpf.agent.core.balance import Purpose, pick_endpoint, target_port
from meshbpf.agent.core.service import LoadBalancerMode, LoadBalancerScope, LoadBalancing, Service
from meshbpf.agent.core.workload import ApplicationTunnel, Locality, TunnelFraming, Workload
from tests.unit.core.builders import gateway, mesh, pod, rng, service

pytestmark = pytest.mark.compat

R, Z, S, N, C, W = (
    LoadBalancerScope.REGION,
    LoadBalancerScope.ZONE,
    LoadBalancerScope.SUBZONE,
    LoadBalancerScope.NODE,
    LoadBalancerScope.CLUSTER,
    LoadBalancerScope.NETWORK,
)
SOURCE = pod("src", "10.0.1.1", locality=Locality("r", "z", "s"), node="n", cluster_id="c")


def endpoint(name: str, ports: Any = None, **fields: Any) -> Workload:
    address = fields.pop("address", f"10.0.0.{sum(map(ord, name)) % 250 + 1}")
    return pod(name, *([address] if address else []), services={"web": ports or {}}, **fields)


def names(
    web: Service, *endpoints: Workload, port: int = 80, draws: int = 200, **options: Any
) -> set[str]:
    """Who is picked, over many draws."""
    snapshot, random = mesh(web, *endpoints), rng()
    found = {pick_endpoint(snapshot, SOURCE, web, port, random, **options) for _ in range(draws)}
    return {"-" if each is None else each.workload.name for each in found}


HERE = endpoint("here", locality=Locality("r", "z", "s"), node="n", cluster_id="c")
ZONE = endpoint("zone", locality=Locality("r", "z", "x"), node="x", cluster_id="c")
REGION = endpoint("region", locality=Locality("r", "x", "s"), node="x", cluster_id="x")
AWAY = endpoint("away", locality=Locality("x", "z", "s"), node="x", cluster_id="x")
ALL = (HERE, ZONE, REGION, AWAY)
FAR_GATEWAY = gateway("/10.250.0.1")
REMOTE = endpoint(
    "remote",
    locality=Locality("r", "z", "s"),
    node="n",
    cluster_id="c",
    network="far",
    network_gateway=FAR_GATEWAY,
)

LOCALITY = [
    # mode, scopes, endpoints, picked
    (LoadBalancerMode.UNSPECIFIED, (R, Z), ALL, {"here", "zone", "region", "away"}),
    (LoadBalancerMode.FAILOVER, (), ALL, {"here", "zone", "region", "away"}),
    (LoadBalancerMode.FAILOVER, (R, Z, S), ALL, {"here"}),
    (LoadBalancerMode.FAILOVER, (R, Z), ALL, {"here", "zone"}),
    (LoadBalancerMode.FAILOVER, (R,), ALL, {"here", "zone", "region"}),
    (LoadBalancerMode.FAILOVER, (R, Z, S), (ZONE, REGION, AWAY), {"zone"}),
    # consecutive: `away` matches zone and subzone, but not the region before them
    (LoadBalancerMode.FAILOVER, (R, Z, S), (REGION, AWAY), {"region"}),
    (LoadBalancerMode.FAILOVER, (R, Z, S), (AWAY,), {"away"}),
    (LoadBalancerMode.FAILOVER, (N,), ALL, {"here"}),
    (LoadBalancerMode.FAILOVER, (C,), ALL, {"here", "zone"}),
    (LoadBalancerMode.STRICT, (R, Z, S), ALL, {"here"}),
    (LoadBalancerMode.STRICT, (R, Z, S), (ZONE, REGION, AWAY), {"-"}),
    (LoadBalancerMode.STRICT, (), ALL, {"here", "zone", "region", "away"}),
    (LoadBalancerMode.STRICT, (N,), (ZONE, HERE), {"here"}),
    # a preferred network outranks all other scopes, and is not required
    (LoadBalancerMode.FAILOVER, (W, R, Z), (REMOTE, AWAY), {"away"}),
    (LoadBalancerMode.FAILOVER, (W, R, Z), (REMOTE,), {"remote"}),
    (LoadBalancerMode.FAILOVER, (R, Z), (REMOTE, AWAY), {"remote"}),
    (LoadBalancerMode.FAILOVER, (R, W), (REMOTE, AWAY), {"remote"}),
    (LoadBalancerMode.STRICT, (W, R), (REMOTE,), {"-"}),
]


@pytest.mark.parametrize(("mode", "scopes", "endpoints", "picked"), LOCALITY)
def test_locality(
    mode: LoadBalancerMode,
    scopes: tuple[LoadBalancerScope, ...],
    endpoints: tuple[Workload, ...],
    picked: set[str],
) -> None:
    web = service("web", load_balancing=LoadBalancing(scopes, mode))
    assert names(web, *endpoints) == picked


def test_endpoint_without_address_or_across_networks_without_gateway_is_never_taken() -> None:
    nowhere = endpoint("nowhere", address="")
    lost = endpoint("lost", network="far")
    assert names(service("web"), nowhere, lost) == {"-"}
    assert names(service("web"), nowhere, lost, HERE) == {"here"}


def test_port_that_the_service_lacks_has_no_endpoint() -> None:
    assert names(service("web"), HERE, port=81) == {"-"}


def test_named_port_is_served_by_those_who_say_what_it_is() -> None:
    web = service("web", ports={80: 0})
    assert names(web, endpoint("knows", {80: 7000}), endpoint("not")) == {"knows"}


def test_waypoint_with_a_tunnel_serves_ports_that_its_service_lacks() -> None:
    web = service("web", ports={15021: 15021})
    tunnel = endpoint("tunnel", application_tunnel=ApplicationTunnel(TunnelFraming.PROXY, 15088))
    assert names(web, HERE, tunnel, port=15008, purpose=Purpose.WAYPOINT) == {"tunnel"}
    assert names(web, HERE, tunnel, port=15008) == {"-"}


def test_capacity_is_the_share_of_connections() -> None:
    web = service("web")
    snapshot = mesh(web, endpoint("one"), endpoint("three", capacity=3), endpoint("no", capacity=0))
    random, count = rng(), Counter[str]()
    for _ in range(4000):
        picked = pick_endpoint(snapshot, SOURCE, web, 80, random)
        assert picked is not None
        count[picked.workload.name] += 1
    assert set(count) == {"one", "three"}
    assert 0.70 < count["three"] / 4000 < 0.80


def test_no_capacity_at_all_is_no_endpoint() -> None:
    assert names(service("web"), endpoint("no", capacity=0)) == {"-"}


def test_sources_in_different_places_do_not_share_a_choice() -> None:
    web = service("web", load_balancing=LoadBalancing((N,), LoadBalancerMode.STRICT))
    near, far = endpoint("near", node="n"), endpoint("far", node="m")
    snapshot, random = mesh(web, near, far), rng()
    other = pod("other", "10.0.1.2", node="m")
    for source, want in ((SOURCE, near), (other, far), (SOURCE, near)):
        picked = pick_endpoint(snapshot, source, web, 80, random)
        assert picked is not None
        assert picked.workload is want


def test_choices_kept_with_the_endpoints_are_bounded() -> None:
    web = service("web")
    snapshot, random = mesh(web, HERE), rng()
    for port in range(1, 5_000):
        pick_endpoint(snapshot, SOURCE, web, port, random)
    assert len(snapshot.endpoints(web).memo) <= 1024


@pytest.mark.parametrize(
    ("own", "service_ports", "tunnel", "want"),
    [
        ({80: 7000}, {80: 8080}, None, 7000),
        ({}, {80: 8080}, None, 8080),
        ({80: 7000}, {80: 0}, None, 7000),
        ({}, {80: 0}, None, None),
        ({}, {}, ApplicationTunnel(TunnelFraming.PROXY, 15088), 80),
        ({}, {}, ApplicationTunnel(TunnelFraming.PROXY), None),
    ],
)
def test_target_port(own: Any, service_ports: Any, tunnel: Any, want: int | None) -> None:
    web = service("web", ports=service_ports)
    workload = endpoint("e", own, application_tunnel=tunnel)
    (found,) = mesh(web, workload).endpoints(web)
    assert target_port(found, web, 80) == want
