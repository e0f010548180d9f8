"""Workloads that the mesh knows by a hostname alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from meshbpf.agent.core.route import HboneRoute, PlainRoute, Refused
from meshbpf.agent.core.routing import outbound
from tests.unit.core.builders import at, gateway, ip, mesh, plain, pod, rng, service

pytestmark = pytest.mark.compat

SOURCE = pod("src", "10.0.0.1")
DB = plain("db", services={"db": {}}, hostname="db.example.com")
MESH = mesh(SOURCE, DB, service("db", "10.9.0.1", "fd09::1", ports={80: 5432}))


def go(target: str, *addresses: str, snapshot: Any = MESH, host: str = "db.example.com") -> Any:
    names = {host: [ip(text) for text in addresses]}
    return outbound(snapshot, SOURCE, at(target), rng=rng(), names=names)


def test_the_name_is_asked_for_before_anything_is_dialed() -> None:
    route = outbound(MESH, SOURCE, at("10.9.0.1:80"), rng=rng())
    assert isinstance(route, Refused)
    assert route.unresolved == "db.example.com"


def test_an_address_of_the_clients_family_is_dialed() -> None:
    for target, dialed in (("10.9.0.1:80", "192.0.2.1:5432"), ("[fd09::1]:80", "[fd00::7]:5432")):
        route = go(target, "fd00::7", "192.0.2.1")
        assert isinstance(route, PlainRoute)
        assert str(route.target) == dialed


def test_another_family_is_better_than_none() -> None:
    assert str(go("10.9.0.1:80", "fd00::7").target) == "[fd00::7]:5432"


def test_several_addresses_share_the_connections() -> None:
    random, count = rng(), Counter[str]()
    names = {"db.example.com": [ip("192.0.2.1"), ip("192.0.2.2")]}
    for _ in range(400):
        route = outbound(MESH, SOURCE, at("10.9.0.1:80"), rng=random, names=names)
        assert isinstance(route, PlainRoute)
        count[str(route.target.ip)] += 1
    assert set(count) == {"192.0.2.1", "192.0.2.2"}
    assert min(count.values()) > 120


def test_a_name_without_address_is_not_asked_for_again() -> None:
    route = go("10.9.0.1:80")
    assert isinstance(route, Refused)
    assert (route.code, route.unresolved) == ("no-address", "")


def test_a_waypoint_may_be_known_by_its_hostname() -> None:
    waypoint = pod("wp", hostname="wp.example.com", services={"wp": {}})
    snapshot = mesh(
        SOURCE,
        waypoint,
        service("wp", ports={15008: 15008}),
        service("web", "10.9.0.2", waypoint=gateway("default/wp")),
    )
    route = go("10.9.0.2:80", "192.0.2.9", snapshot=snapshot, host="wp.example.com")
    assert isinstance(route, HboneRoute)
    assert (str(route.gateway), route.authority) == ("192.0.2.9:15008", "10.9.0.2:80")
