"""A snapshot made by deltas answers as one of the whole state; what did not change is shared."""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from meshbpf.agent.core.policy import Authorization, PolicyAction, PolicyScope
from meshbpf.agent.core.service import Service, ServiceEndpoint
from meshbpf.agent.core.state import MeshDelta, MeshState
from meshbpf.agent.core.steering import MeshPrefixes, mesh_prefixes
from meshbpf.agent.core.store import Snapshot, address_rank
from meshbpf.agent.core.store_delta import delta_to
from meshbpf.agent.core.workload import HealthStatus, NamespacedHostname, NetworkMode, Workload
from tests.unit.core.builders import ip, mesh, plain, pod, service

HOSTS = ("web", "db", "other/web")


@st.composite
def workloads(draw: Any) -> Workload:
    number = draw(st.integers(0, 5))
    make = draw(st.sampled_from((pod, plain)))
    return make(
        f"p{number}",
        *draw(st.sets(st.sampled_from(("10.0.0.1", "10.0.0.2", "fd00::1")))),
        uid=draw(st.sampled_from((f"c//Pod/default/p{number}", f"c/WorkloadEntry/p{number}"))),
        hostname=draw(st.sampled_from(("", "h.one", "h.two"))),
        services={host: {80: 8080} for host in draw(st.sets(st.sampled_from(HOSTS)))},
        status=draw(st.sampled_from(HealthStatus)),
        network_mode=draw(st.sampled_from(NetworkMode)),
        authorization_policies=tuple(draw(st.sets(st.sampled_from(("default/s", "default/t"))))),
    )


@st.composite
def services(draw: Any) -> Service:
    host = draw(st.sampled_from(("web", "db")))
    return service(
        host,
        *draw(st.sets(st.sampled_from(("10.9.0.1", "10.9.0.2", "10.9.0.0/16", "fd09::/64")))),
        namespace=draw(st.sampled_from(("default", "other"))),
        canonical=draw(st.booleans()),
        endpoints=tuple(
            ServiceEndpoint(f"c//Pod/default/p{number}", {80: 1})
            for number in draw(st.sets(st.integers(0, 2)))
        ),
    )


@st.composite
def policies(draw: Any) -> Authorization:
    return Authorization(
        name=draw(st.sampled_from("stu")),
        namespace=draw(st.sampled_from(("default", "other"))),
        scope=draw(st.sampled_from(PolicyScope)),
        action=draw(st.sampled_from(PolicyAction)),
    )


DELTAS = st.builds(
    MeshDelta,
    workloads=st.lists(workloads(), max_size=4),
    services=st.lists(services(), max_size=3),
    policies=st.lists(policies(), max_size=3),
    removed_workloads=st.lists(st.builds("c//Pod/default/p{}".format, st.integers(0, 5))),
    removed_services=st.lists(
        st.builds(
            NamespacedHostname, st.sampled_from(("default", "other")), st.sampled_from(("web",))
        )
    ),
    removed_policies=st.lists(st.sampled_from(("default/s", "other/t", "none/none"))),
)


class Model:
    """The mesh as three plain dictionaries."""

    def __init__(self) -> None:
        self.workloads: dict[str, Workload] = {}
        self.services: dict[NamespacedHostname, Service] = {}
        self.policies: dict[str, Authorization] = {}

    def apply(self, delta: MeshDelta) -> None:
        for table, keys in (
            (self.workloads, delta.removed_workloads),
            (self.services, delta.removed_services),
            (self.policies, delta.removed_policies),
        ):
            for key in keys:
                table.pop(key, None)  # type: ignore[attr-defined]
        self.workloads.update((one.uid, one) for one in delta.workloads)
        self.services.update((one.key, one) for one in delta.services)
        self.policies.update((one.key, one) for one in delta.policies)

    def state(self) -> MeshState:
        return MeshState(
            tuple(self.workloads.values()),
            tuple(self.services.values()),
            tuple(self.policies.values()),
        )


def standing(one: Service | None, client: str | None) -> tuple[bool, ...]:
    """How a service ranks for a client: within its own namespace, the first is the best."""
    if one is None:
        return ()
    own = one.namespace == client
    return (own, own or one.canonical)


def check_same(found: Snapshot, whole: Snapshot) -> None:
    """Every lookup answers alike; where several are equally first, one of them does."""
    assert {w.uid: w for w in found.workloads} == {w.uid: w for w in whole.workloads}
    assert {s.key: s for s in found.services} == {s.key: s for s in whole.services}
    assert {p.key: p for p in found.policies} == {p.key: p for p in whole.policies}
    for number in range(6):
        name = found.workload_named("default", f"p{number}")
        assert {w.uid for w in name} == {
            w.uid for w in whole.workload_named("default", f"p{number}")
        }
    for text in ("10.0.0.1", "10.0.0.2", "fd00::1"):
        here, there = found.workload_at("", ip(text)), whole.workload_at("", ip(text))
        assert (here and address_rank(here)) == (there and address_rank(there))
        assert here is None or ip(text) in here.addresses
    for hostname in ("h.one", "h.two"):
        here = found.workload_with_hostname("default", hostname)
        assert (here is None) == (whole.workload_with_hostname("default", hostname) is None)
        assert here is None or here.hostname == hostname
    for text in ("10.9.0.1", "10.9.0.2", "10.9.7.7", "fd09::9"):
        for namespace in ("default", "other", "third", None):
            a = found.service_at("", ip(text), namespace)
            b = whole.service_at("", ip(text), namespace)
            assert standing(a, namespace) == standing(b, namespace)
    for one in whole.services:
        assert {(e.workload, tuple(e.ports)) for e in found.endpoints(one)} == {
            (e.workload, tuple(e.ports)) for e in whole.endpoints(one)
        }
    for each in whole.workloads:
        assert set(found.policies_for(each)) == set(whole.policies_for(each))


@given(st.lists(DELTAS, max_size=6))
@settings(max_examples=60, deadline=None)
def test_deltas_lead_where_the_whole_state_would(steps: list[MeshDelta]) -> None:
    found, model, prefixes = Snapshot.EMPTY, Model(), MeshPrefixes()
    for number, delta in enumerate(steps):
        before = found
        found = found.after(delta, number)
        model.apply(delta)
        whole = Snapshot.of(model.state())
        check_same(found, whole)
        change = prefixes.change(before, found, delta)
        had = set(prefixes)
        prefixes.commit(change)
        assert set(prefixes) == mesh_prefixes(whole)
        assert set(prefixes) == (had | set(change.added)) - set(change.removed)
    assert len(delta_to(found, model.state())) == 0
    emptied = found.after(delta_to(found, MeshState()), 99)
    check_same(emptied, Snapshot.EMPTY)
    assert len(emptied._addresses) == len(emptied._vips) == len(emptied._members) == 0
    assert not emptied._ranges


def test_a_record_that_is_sent_again_unchanged_changes_nothing() -> None:
    a, web = pod("a", "10.0.0.1", services={"web": {80: 1}}), service("web", "10.9.0.1")
    before = mesh(a, web)
    found = before.endpoints(web)
    again = replace(a, capacity=2)
    after = before.after(MeshDelta(workloads=(replace(again, capacity=1),), services=(web,)), 2)
    assert after.workload(a.uid) is a
    assert after.endpoints(web) is found


def test_what_is_collected_stays_when_something_else_changes() -> None:
    web, db = service("web"), service("db")
    before = mesh(
        pod("a", "10.0.0.1", services={"web": {80: 1}}),
        pod("b", "10.0.0.2", services={"db": {80: 1}}),
        web,
        db,
    )
    of_web, of_db = before.endpoints(web), before.endpoints(db)
    sets = before.policies_for(pod("a"))
    moved = pod("b", "10.0.0.3", services={"db": {80: 1}})
    after = before.after(MeshDelta(workloads=(moved,)), 2)
    assert after.endpoints(web) is of_web
    assert after.endpoints(db) is not of_db
    assert [e.workload for e in after.endpoints(db)] == [moved]
    assert after.policies_for(pod("a")) is sets
    elsewhere = Authorization("p", "other", PolicyScope.NAMESPACE, PolicyAction.DENY)
    assert after.after(MeshDelta(policies=(elsewhere,)), 3).policies_for(pod("a")) is sets
    here = replace(elsewhere, namespace="default")
    assert after.after(MeshDelta(policies=(here,)), 3).policies_for(pod("a")) == (here,)


def test_a_policy_that_arrives_replaces_its_stand_in() -> None:
    a = pod("a", authorization_policies=("default/s",))
    before = mesh(a)
    assert before.policies_for(a)[0].inexpressible
    arrived = Authorization(
        "s", "default", PolicyScope.WORKLOAD_SELECTOR, PolicyAction.ALLOW, rules=(((),),)
    )
    after = before.after(MeshDelta(policies=(arrived,)), 2)
    assert after.policies_for(a) == (arrived,)
    gone = after.after(MeshDelta(removed_policies=("default/s",)), 3)
    assert gone.policies_for(a)[0].inexpressible


def test_a_workload_that_replaces_another_keeps_its_place_among_equals() -> None:
    first, second = pod("a", "10.0.0.1", uid="c//Pod/1"), pod("a", "10.0.0.1", uid="c//Pod/2")
    before = mesh(first, second)
    assert before.workload_at("", ip("10.0.0.1")) is first
    changed = replace(first, capacity=3)
    after = before.after(MeshDelta(workloads=(changed,)), 2)
    assert after.workload_at("", ip("10.0.0.1")) is changed
    gone = after.after(MeshDelta(removed_workloads=(first.uid,)), 3)
    assert gone.workload_at("", ip("10.0.0.1")) is second


def test_a_small_delta_costs_the_same_in_a_large_mesh() -> None:
    """A hundred times the mesh must take far less than a hundred times as long."""

    def seconds(count: int) -> float:
        members = [
            pod(f"p{i}", f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}", services={f"s{i % 50}": {80: 1}})
            for i in range(count)
        ]
        snapshot = mesh(*members, *(service(f"s{i}") for i in range(50)))
        delta = MeshDelta(workloads=[replace(one, capacity=2) for one in members[:20]])
        best = float("inf")
        gc.disable()
        for _ in range(20):
            start = time.process_time()
            snapshot.after(delta, 2)
            best = min(best, time.process_time() - start)
        gc.enable()
        return best

    assert seconds(50_000) < 10 * seconds(500)
