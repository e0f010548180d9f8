"""Lookups of a snapshot: what is found, and whose an address is when several claim it."""

from __future__ import annotations

import time
from dataclasses import replace
from ipaddress import IPv4Network

import pytest

from meshbpf.agent.core.service import (
    HealthPolicy,
    LoadBalancing,
    NetworkCidr,
    Service,
    ServiceEndpoint,
    Visibility,
)
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import HealthStatus, NetworkMode
from tests.unit.core.builders import ip, mesh, plain, pod, service, state

pytestmark = pytest.mark.compat

A = pod("a", "10.0.0.1", "fd00::1", services={"web.local": {80: 9000}}, hostname="a.pods")


def test_workload_is_found_by_uid_name_address_and_hostname() -> None:
    snapshot = mesh(A)
    assert snapshot.workload(A.uid) is A
    assert snapshot.workload_named("default", "a") == (A,)
    assert snapshot.workload_at("", ip("10.0.0.1")) is A
    assert snapshot.workload_at("", ip("fd00::1")) is A
    assert snapshot.workload_with_hostname("default", "a.pods") is A


def test_what_is_not_there_is_not_found() -> None:
    snapshot = mesh(A, service("web.local", "10.9.0.1"))
    assert snapshot.workload("?") is None
    assert snapshot.workload_named("other", "a") == ()
    assert snapshot.workload_at("net", ip("10.0.0.1")) is None
    assert snapshot.workload_at("", ip("::a00:1")) is None  # same bits, other family
    assert snapshot.service_at("net", ip("10.9.0.1"), "default") is None
    assert snapshot.service("other", "web.local") is None
    assert Snapshot.EMPTY.workload_at("", ip("10.0.0.1")) is None


def test_one_address_on_two_networks_is_two_hosts() -> None:
    far = pod("far", "10.0.0.1", network="far")
    snapshot = mesh(A, far)
    assert snapshot.workload_at("", ip("10.0.0.1")) is A
    assert snapshot.workload_at("far", ip("10.0.0.1")) is far


def test_host_network_workload_is_not_found_by_address() -> None:
    host = pod("host", "10.0.0.7", network_mode=NetworkMode.HOST_NETWORK)
    snapshot = mesh(host)
    assert snapshot.workload_at("", ip("10.0.0.7")) is None
    assert snapshot.workload(host.uid) is host


@pytest.mark.parametrize("order", [1, -1])
def test_address_belongs_to_the_pod_then_to_the_mesh_member(order: int) -> None:
    entry = pod("entry", "10.0.0.1", uid="c/ServiceEntry/default/entry")
    loose = plain("loose", "10.0.0.2", uid="c/WorkloadEntry/default/loose")
    member = pod("member", "10.0.0.2", uid="c/WorkloadEntry/default/member")
    pod_outside = plain("a", "10.0.0.1")
    snapshot = mesh(*[entry, pod_outside, loose, member][::order])
    assert snapshot.workload_at("", ip("10.0.0.1")) is pod_outside
    assert snapshot.workload_at("", ip("10.0.0.2")) is member


def test_of_services_with_one_address_the_clients_namespace_wins_then_the_canonical() -> None:
    first = service("s", "10.9.0.1", namespace="one")
    mine = service("s", "10.9.0.1", namespace="mine")
    canonical = service("s", "10.9.0.1", namespace="two", canonical=True)
    vip = ip("10.9.0.1")
    snapshot = mesh(first, canonical, mine)
    assert snapshot.service_at("", vip, "mine") is mine
    assert snapshot.service_at("", vip, "other") is canonical
    assert snapshot.service_at("", vip, None) is canonical
    assert mesh(first, mine).service_at("", vip, "other") is first
    assert snapshot.service_with_hostname("s", "mine") is mine
    assert snapshot.service_with_hostname("s", "other") is canonical


def test_of_two_ranges_of_the_clients_namespace_the_canonical_services_wins() -> None:
    wide = (NetworkCidr("", IPv4Network("10.9.0.0/16")),)
    first = Service("y", "mine", "y", cidr_addresses=wide)
    canonical = Service("x", "mine", "x", cidr_addresses=wide, canonical=True)
    for order in ((first, canonical), (canonical, first)):
        snapshot = mesh(*order)
        assert snapshot.service_at("", ip("10.9.0.1"), "mine") is canonical


def test_service_of_a_namespace_is_invisible_from_others() -> None:
    hidden = service("s", "10.9.0.1", namespace="one", visibility=Visibility.NAMESPACE)
    snapshot = mesh(hidden)
    assert snapshot.service_at("", ip("10.9.0.1"), "one") is hidden
    assert snapshot.service_at("", ip("10.9.0.1"), "two") is None
    assert snapshot.service_with_hostname("s", "two") is None


def test_hidden_exact_address_leaves_the_range_to_be_found() -> None:
    hidden = service("s", "10.9.0.1", namespace="one", visibility=Visibility.NAMESPACE)
    wide = service("w", "10.9.0.0/16", namespace="three")
    assert mesh(hidden, wide).service_at("", ip("10.9.0.1"), "two") is wide


def test_longest_range_wins_unless_a_shorter_one_is_the_clients_own() -> None:
    wide = service("wide", "10.0.0.0/8", namespace="mine")
    narrow = service("narrow", "10.9.0.0/16", namespace="other")
    exact = service("exact", "10.9.0.1", namespace="other")
    six = service("six", "fd00::/16", namespace="other")
    snapshot = mesh(wide, narrow, exact, six)
    assert snapshot.service_at("", ip("10.9.9.9"), "elsewhere") is narrow
    assert snapshot.service_at("", ip("10.9.9.9"), "mine") is wide
    assert snapshot.service_at("", ip("10.8.0.1"), "elsewhere") is wide
    assert snapshot.service_at("", ip("10.9.0.1"), "mine") is exact
    assert snapshot.service_at("", ip("fd00:1::1"), "mine") is six
    assert snapshot.service_at("", ip("192.0.2.1"), "mine") is None
    assert snapshot.service_at("net", ip("10.9.9.9"), "mine") is None


def test_endpoints_come_from_workloads_and_from_the_service_itself() -> None:
    b = pod("b", "10.0.0.2")
    web = service("web.local", endpoints=(ServiceEndpoint(b.uid, {80: 7000}),))
    found = {e.workload.name: e.ports for e in mesh(A, b, web).endpoints(web)}
    assert found == {"a": {80: 9000}, "b": {80: 7000}}


def test_unhealthy_endpoints_are_out_unless_the_service_takes_all() -> None:
    sick = replace(A, status=HealthStatus.UNHEALTHY)
    web = service("web.local")
    assert mesh(sick, web).endpoints(web) == ()
    generous = replace(web, load_balancing=LoadBalancing(health_policy=HealthPolicy.ALLOW_ALL))
    assert [e.workload for e in mesh(sick, generous).endpoints(generous)] == [sick]


def test_endpoint_of_an_unknown_service_or_workload_is_nobodys() -> None:
    web = service("other.local", endpoints=(ServiceEndpoint("c//Pod/default/gone"),))
    assert mesh(A, web).endpoints(web) == ()


def test_building_is_linear() -> None:
    """Ten times the state must take well under a hundred times as long."""

    def seconds(count: int) -> float:
        records = [
            pod(f"p{i}", f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}", services={"web": {80: 1}})
            for i in range(count)
        ]
        records_state = state([*records, service("web", "10.99.0.1")])
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            Snapshot.of(records_state)
            best = min(best, time.process_time() - start)
        return best

    assert seconds(10_000) < 40 * seconds(1_000)
