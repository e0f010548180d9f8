"""Who may reach a pod that is bound to a waypoint, where that is required."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from meshbpf.agent.core.admission import admission
from meshbpf.agent.core.authz import ConnectionFacts
from meshbpf.agent.core.carry import between_pods, footprint, plaintext
from meshbpf.agent.core.local_xds import parse_local_xds
from meshbpf.agent.core.policy import Authorization
from meshbpf.agent.core.service import Service, WeightedWaypoint
from meshbpf.agent.core.state import MeshDelta
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import Workload
from tests.unit.core.builders import at, gateway, ip, pod, service, state

CLIENT = pod("client", "10.0.0.1")
WAYPOINT = pod("wp", "10.0.0.8", services={"wp.local": {15008: 15008}})
OTHER = pod("wp2", "10.0.0.9", services={"wp2.local": {15008: 15008}})
GATEWAYS = (
    service("wp.local", "10.9.0.8", ports={15008: 15008}),
    service("wp2.local", "10.9.0.9", ports={15008: 15008}),
)
AT_WP, AT_WP2 = gateway("default/wp.local"), gateway("/10.9.0.9")
BOUND = pod("bound", "10.0.0.2", waypoint=AT_WP)
FREE = pod("free", "10.0.0.3", services={"free.local": {80: 8080}})
MEMBER = pod("member", "10.0.0.4", services={"shop.local": {80: 8080}})
SHOP = service("shop.local", "10.9.0.1", waypoint=AT_WP)


def required(*records: Workload | Service) -> Snapshot:
    return Snapshot.empty(require_waypoint=True).after(
        _delta(CLIENT, WAYPOINT, OTHER, *GATEWAYS, *records), 1
    )


def _delta(*records: Workload | Service) -> MeshDelta:
    return MeshDelta.whole(state(records))


def facts(source: Workload | None, target: Workload) -> ConnectionFacts:
    who = None if source is None else source.identity
    return ConnectionFacts(who, CLIENT.addresses[0], target.addresses[0], 8080)


def let_in(mesh: Snapshot, source: Workload | None, target: Workload) -> bool:
    return admission(mesh, target).decide(facts(source, target)).allowed


@pytest.mark.parametrize("target", [BOUND, MEMBER])
def test_only_the_waypoint_reaches_what_is_bound_to_it(target: Workload) -> None:
    mesh = required(BOUND, MEMBER, SHOP)
    assert let_in(mesh, WAYPOINT, target)
    assert not let_in(mesh, CLIENT, target)
    assert not let_in(mesh, OTHER, target)
    assert not let_in(mesh, None, target), "plaintext proves nothing"


def test_the_reason_names_who_came_instead() -> None:
    decision = admission(required(BOUND), BOUND).decide(facts(CLIENT, BOUND))
    assert decision.reason == f"{CLIENT.identity} is not the waypoint that is required"


def test_what_is_bound_to_none_is_reached_as_ever() -> None:
    mesh = required(BOUND, FREE, service("free.local", "10.9.0.2"))
    for source in (CLIENT, WAYPOINT, None):
        assert let_in(mesh, source, FREE)


def test_without_the_setting_everybody_reaches_everything() -> None:
    records = (CLIENT, WAYPOINT, BOUND, MEMBER, SHOP, *GATEWAYS)
    mesh = Snapshot.of(state(records))
    for target in (BOUND, MEMBER):
        for source in (CLIENT, WAYPOINT, None):
            assert let_in(mesh, source, target)


def test_any_of_weighted_waypoints_will_do() -> None:
    weighted = (WeightedWaypoint(AT_WP, 9), WeightedWaypoint(AT_WP2, 1))
    mesh = required(MEMBER, service("shop.local", "10.9.0.1", weighted_waypoints=weighted))
    assert let_in(mesh, WAYPOINT, MEMBER)
    assert let_in(mesh, OTHER, MEMBER)
    assert not let_in(mesh, CLIENT, MEMBER)


def test_while_the_waypoint_is_not_in_the_mesh_nobody_gets_in() -> None:
    mesh = Snapshot.empty(require_waypoint=True).after(_delta(CLIENT, WAYPOINT, BOUND), 1)
    assert not let_in(mesh, CLIENT, BOUND)
    assert not let_in(mesh, WAYPOINT, BOUND)


def test_a_waypoint_that_its_own_namespace_binds_is_not_locked_out() -> None:
    bound = pod("wp", "10.0.0.8", services={"wp.local": {15008: 15008}}, waypoint=AT_WP)
    mesh = Snapshot.empty(require_waypoint=True).after(_delta(CLIENT, bound, *GATEWAYS), 1)
    assert let_in(mesh, CLIENT, bound)


def test_policy_still_judges_the_waypoint() -> None:
    text = """
policies:
- name: no
  namespace: default
  scope: Namespace
  action: Deny
  rules: [[[{principals: [{Exact: cluster.local/ns/default/sa/wp}]}]]]
"""
    denials = parse_local_xds(text, "test").policies
    mesh = required(BOUND)
    mesh = mesh.after(_policies(denials), 2)
    assert mesh.require_waypoint, "a setting outlives a change of state"
    assert not let_in(mesh, WAYPOINT, BOUND)


def _policies(policies: Iterable[Authorization]) -> MeshDelta:
    return MeshDelta(policies=tuple(policies))


def test_the_kernel_is_not_left_what_skips_a_waypoint() -> None:
    target = at("10.0.0.4:8080")
    own = {ip("10.0.0.4")}
    free = Snapshot.of(state((CLIENT, WAYPOINT, MEMBER, SHOP, *GATEWAYS)))
    assert between_pods(free, CLIENT, ip("10.0.0.1"), MEMBER, own, target).allowed
    mesh = required(MEMBER, SHOP)
    assert not between_pods(mesh, CLIENT, ip("10.0.0.1"), MEMBER, own, target).allowed
    assert not plaintext(mesh, MEMBER, facts(None, MEMBER)).allowed


def test_a_binding_that_comes_or_goes_makes_the_kernel_ask_again() -> None:
    before = required(MEMBER, service("shop.local", "10.9.0.1"))
    after = required(MEMBER, SHOP)
    own = {ip("10.0.0.4")}
    assert footprint(before, MEMBER, own) != footprint(after, MEMBER, own)
    assert not admission(after, MEMBER).says_as(admission(before, MEMBER))
