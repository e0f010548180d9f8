"""Outbound and inbound routes, one row for each way a connection can go."""

from __future__ import annotations

from typing import Any

import pytest

from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.routing import (
    HboneRoute,
    InboundRoute,
    PlainRoute,
    Refused,
    inbound_hbone,
    inbound_plain,
    outbound,
)
from meshbpf.agent.core.service import IPFamilies, LoadBalancerMode, LoadBalancing, Visibility
from meshbpf.agent.core.workload import NetworkMode
from tests.unit.core.builders import at, ip, mesh, plain, pod, rng, service

pytestmark = pytest.mark.compat

SOURCE = pod("src", "10.0.0.1", "fd00::1", node="n1")
SAN = SpiffeId.parse("spiffe://cluster.local/ns/default/sa/shared")

MESH = mesh(
    SOURCE,
    pod("far", "10.0.0.2", "fd00::2", node="n2", services={"web": {80: 9000}}),
    pod("two", "10.0.0.10", "10.0.0.9"),
    pod("near", "10.0.0.3", node="n1"),
    pod("sidecar", "10.0.0.7", native_tunnel=True),  # HBONE by its own proxy, at the same port
    plain("outsider", "10.0.0.4", services={"plain": {}}),
    pod("host", "10.0.0.5", network_mode=NetworkMode.HOST_NETWORK),
    pod("remote", "10.0.0.6", network="elsewhere", services={"remote": {}}),
    pod("six", "fd00::7", services={"four-only": {}, "any": {}}),
    service("web", "10.9.0.1", "fd09::1", ports={80: 8080, 443: 0}, subject_alt_names=(SAN,)),
    service("plain", "10.9.0.2"),
    service("empty", "10.9.0.3"),
    service("remote", "10.9.0.4"),
    service("four-only", "10.9.0.5", ip_families=IPFamilies.IPV4_ONLY),
    service("any", "10.9.0.6"),
    service("hidden", "10.9.0.7", namespace="other", visibility=Visibility.NAMESPACE),
    service(
        "passing",
        "10.9.0.8",
        load_balancing=LoadBalancing(mode=LoadBalancerMode.PASSTHROUGH),
    ),
    service("range", "10.8.0.0/16", ports={80: 8080}),
    pod("in-range", "10.0.0.8", services={"range": {}}),
)


def go(target: str, source: Any = SOURCE, snapshot: Any = MESH) -> Any:
    return outbound(snapshot, source, at(target), rng=rng())


HBONE = [
    # dialed, gateway, authority, destination, service
    ("10.0.0.2:8080", "10.0.0.2:15008", "10.0.0.2:8080", "far", None),
    ("[fd00::2]:8080", "[fd00::2]:15008", "[fd00::2]:8080", "far", None),
    ("10.0.0.9:80", "10.0.0.9:15008", "10.0.0.9:80", "two", None),  # its second address
    ("10.0.0.3:22", "10.0.0.3:15008", "10.0.0.3:22", "near", None),  # the same node as ours
    ("10.0.0.1:80", "10.0.0.1:15008", "10.0.0.1:80", "src", None),  # itself
    ("10.0.0.7:80", "10.0.0.7:15008", "10.0.0.7:80", "sidecar", None),
    ("10.9.0.1:80", "10.0.0.2:15008", "10.0.0.2:9000", "far", "web"),
    ("[fd09::1]:80", "[fd00::2]:15008", "[fd00::2]:9000", "far", "web"),  # the client's family
    ("10.9.0.6:80", "[fd00::7]:15008", "[fd00::7]:8080", "six", "any"),  # the only family
    ("10.8.3.4:80", "10.0.0.8:15008", "10.0.0.8:8080", "in-range", "range"),
]


@pytest.mark.parametrize(("target", "tunnel", "authority", "name", "host"), HBONE)
def test_hbone(target: str, tunnel: str, authority: str, name: str, host: str | None) -> None:
    route = go(target)
    assert isinstance(route, HboneRoute)
    assert (str(route.gateway), route.authority) == (tunnel, authority)
    assert str(route.target) == authority
    assert route.destination.name == name
    assert (route.service.hostname if route.service else None) == host
    own = {SpiffeId("cluster.local", "default", name)}
    assert route.expected == (own | {SAN} if host == "web" else own)


PLAIN = [
    ("10.0.0.4:80", "10.0.0.4:80", "outsider", None),
    ("10.9.0.2:80", "10.0.0.4:8080", "outsider", "plain"),
    ("192.0.2.1:443", "192.0.2.1:443", None, None),
    ("10.0.0.5:80", "10.0.0.5:80", None, None),  # a host-network pod is not known by address
    ("10.0.0.6:80", "10.0.0.6:80", None, None),  # that address is of another network
    ("10.9.0.7:80", "10.9.0.7:80", None, None),  # a service that we may not see
    ("10.9.0.8:80", "10.9.0.8:80", None, "passing"),
    ("10.0.0.4:15008", "10.0.0.4:15008", "outsider", None),
]


@pytest.mark.parametrize(("target", "dialed", "name", "host"), PLAIN)
def test_plain(target: str, dialed: str, name: str | None, host: str | None) -> None:
    route = go(target)
    assert isinstance(route, PlainRoute)
    assert str(route.target) == dialed
    assert (route.destination.name if route.destination else None) == name
    assert (route.service.hostname if route.service else None) == host


REFUSED = [
    ("127.0.0.1:15001", "loopback"),
    ("127.8.8.8:80", "loopback"),
    ("[::1]:80", "loopback"),
    ("0.0.0.0:80", "loopback"),
    ("[::]:80", "loopback"),
    ("10.9.0.1:81", "unknown-port"),
    ("10.9.0.1:443", "no-endpoint"),  # a named port that no endpoint knows
    ("10.9.0.3:80", "no-endpoint"),
    ("10.9.0.4:80", "no-endpoint"),  # its only endpoint is on another network
    ("10.9.0.5:80", "no-address"),
    ("10.0.0.2:15008", "internal-port"),
    ("10.0.0.2:15006", "internal-port"),
    ("10.0.0.2:15001", "internal-port"),
]


@pytest.mark.parametrize(("target", "code"), REFUSED)
def test_refused(target: str, code: str) -> None:
    route = go(target)
    assert isinstance(route, Refused)
    assert route.code == code
    assert route.reason


def test_workload_and_service_on_one_address_is_routed_as_the_service() -> None:
    snapshot = mesh(
        SOURCE, pod("a", "10.0.0.2", services={"web": {80: 1}}), service("web", "10.0.0.2")
    )
    route = go("10.0.0.2:80", snapshot=snapshot)
    assert isinstance(route, HboneRoute)
    assert route.authority == "10.0.0.2:1"


LOCAL = pod("local", "10.0.0.2", "fd00::2", services={"web": {80: 9000}, "named": {}, "api": {}})
INBOUND = mesh(
    LOCAL,
    pod("other", "10.0.0.3"),
    service("web", "10.9.0.1", ports={80: 8080, 82: 6000}),
    service("named", "10.9.0.2", ports={443: 0}),
    service("api", "10.9.0.3", ports={80: 7000, 81: 15008, 82: 6000}),
    service("hidden", namespace="elsewhere", visibility=Visibility.NAMESPACE),
)
OWN = frozenset(LOCAL.addresses)

INBOUND_ROUTES = [
    # authority, dialed, service
    ("10.0.0.2:8000", "10.0.0.2:8000", None),
    ("10.0.0.2:9000", "10.0.0.2:9000", "web"),
    ("10.0.0.2:7000", "10.0.0.2:7000", "api"),
    ("[fd00::2]:22", "[fd00::2]:22", None),
    ("10.0.0.2:6000", "10.0.0.2:6000", None),  # two services lead there: neither is certain
    ("web:80", "10.0.0.2:9000", "web"),
    ("api:80", "10.0.0.2:7000", "api"),
]


@pytest.mark.parametrize(("authority", "dialed", "host"), INBOUND_ROUTES)
def test_inbound(authority: str, dialed: str, host: str | None) -> None:
    route = inbound_hbone(INBOUND, LOCAL, OWN, authority)
    assert isinstance(route, InboundRoute), route
    assert str(route.target) == dialed
    assert (route.service.hostname if route.service else None) == host


INBOUND_REFUSED = [
    ("", 400, "bad-authority"),
    ("10.0.0.2", 400, "bad-authority"),
    ("10.0.0.2:0", 400, "bad-authority"),
    ("10.0.0.2:99999", 400, "bad-authority"),
    ("10.0.0.2:80/", 400, "bad-authority"),
    ("user@web:80", 400, "bad-authority"),
    ("999.0.0.2:80", 400, "bad-authority"),
    ("web:80:80", 400, "bad-authority"),
    ("web:", 400, "bad-authority"),
    ("http://web:80", 400, "bad-authority"),
    ("10.0.0.3:80", 400, "wrong-destination"),
    ("8.8.8.8:80", 400, "wrong-destination"),
    ("127.0.0.1:80", 400, "wrong-destination"),
    ("[::1]:80", 400, "wrong-destination"),
    ("[::ffff:127.0.0.1]:80", 400, "wrong-destination"),
    ("10.9.0.1:80", 400, "wrong-destination"),  # its service's address, and it is no waypoint
    ("nobody:80", 503, "unknown-host"),
    ("hidden:80", 503, "unknown-host"),
    ("web:81", 503, "unknown-port"),
    ("named:443", 503, "unknown-port"),
    ("10.0.0.2:15008", 503, "internal-port"),
    ("10.0.0.2:15001", 503, "internal-port"),
    ("10.0.0.2:15006", 503, "internal-port"),
    ("api:81", 503, "internal-port"),
]


@pytest.mark.parametrize(("authority", "status", "code"), INBOUND_REFUSED)
def test_inbound_refused(authority: str, status: int, code: str) -> None:
    route = inbound_hbone(INBOUND, LOCAL, OWN, authority)
    assert isinstance(route, Refused), route
    assert (route.status, route.code) == (status, code)


def test_loopback_is_refused_even_if_listed_among_the_pods_addresses() -> None:
    route = inbound_hbone(INBOUND, LOCAL, OWN | {ip("127.0.0.1")}, "127.0.0.1:80")
    assert isinstance(route, Refused)
    assert (route.status, route.code) == (400, "loopback")


def test_hostname_is_dialed_at_the_address_that_the_tunnel_came_to() -> None:
    route = inbound_hbone(INBOUND, LOCAL, OWN, "web:80", arrived_at=ip("fd00::2"))
    assert isinstance(route, InboundRoute)
    assert str(route.target) == "[fd00::2]:9000"


@pytest.mark.parametrize(
    ("target", "want"),
    [
        ("10.0.0.2:9000", "web"),
        ("10.0.0.2:22", None),
        ("10.0.0.2:15008", "internal-port"),
        ("10.0.0.2:15001", "internal-port"),
        ("127.0.0.1:80", "loopback"),
    ],
)
def test_inbound_plaintext(target: str, want: str | None) -> None:
    route = inbound_plain(INBOUND, LOCAL, at(target))
    if isinstance(route, Refused):
        assert route.code == want
    else:
        assert str(route.target) == target
        assert (route.service.hostname if route.service else None) == want
