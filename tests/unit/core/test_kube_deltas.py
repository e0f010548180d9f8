"""A cluster's state kept up by what changes is the one that a whole translation gives."""

from __future__ import annotations

import time
from collections.abc import Iterator
from random import Random
from types import MappingProxyType
from typing import Any

import pytest

from meshbpf.agent.core.kube_cluster import Cluster, Problem
from meshbpf.agent.core.kube_mesh import translate
from meshbpf.agent.core.kube_state import ClusterState, Standing
from meshbpf.agent.core.objects import KubeObject, ObjectKey, ObjectSet
from meshbpf.agent.core.state import MeshState
from meshbpf.agent.core.store import Snapshot
from tests.unit.core.kube_random import Objects

KEPT = "its last good form stays in force"


class Whole:
    """The rules of ClusterState, said once more and as plainly as can be: all anew each time."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._good: dict[ObjectKey, KubeObject] = {}

    def update(self, given: dict[ObjectKey, KubeObject]) -> tuple[Any, ...]:
        first = translate(ObjectSet(MappingProxyType(given)), self._cluster)
        kept = {
            key: self._good[key]
            for key in first.broken
            if key in self._good and self._good[key] is not given[key]
        }
        force = {**given, **kept}
        second = translate(ObjectSet(MappingProxyType(force)), self._cluster)
        self._good = {key: each for key, each in force.items() if key not in second.broken}
        told = {
            Problem(p.key, p.field, p.reason, KEPT, p.origin)
            for p in first.problems
            if p.key in kept
        }
        return force, second.state, second.broken, first.broken, told | set(second.problems)


def found(standing: Standing) -> tuple[Any, ...]:
    translation = standing.translation
    return (
        dict(standing.objects.by_key),
        translation.state,
        translation.broken,
        standing.broken,
        set(standing.problems),
    )


def in_order(state: MeshState) -> tuple[Any, ...]:
    return (
        sorted(state.workloads, key=lambda one: one.uid),
        sorted(state.services, key=lambda one: str(one.key)),
        sorted(state.policies, key=lambda one: one.key),
    )


def records(mesh: Snapshot) -> MeshState:
    return MeshState(tuple(mesh.workloads), tuple(mesh.services), tuple(mesh.policies))


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_changes_in_any_order_come_to_what_the_whole_comes_to(seed: int, by_hand: bool) -> None:
    rng = Random(seed)
    objects, cluster = Objects(rng), Cluster(by_hand=by_hand)
    state, whole, mesh = ClusterState(cluster), Whole(cluster), Snapshot.EMPTY
    given: dict[ObjectKey, KubeObject] = {}
    kept = full = 0
    for step in range(100):
        changes = objects.changes()
        for key, each in changes.items():
            given.pop(key, None) if each is None else given.__setitem__(key, each)
        standing = state.change(changes)
        mesh = mesh.after(standing.delta, mesh.version + 1)
        now, wanted = found(standing), whole.update(dict(given))
        assert now[0] == wanted[0], step
        assert in_order(now[1]) == in_order(wanted[1]), step
        assert now[2:] == wanted[2:], step
        assert in_order(records(mesh)) == in_order(now[1]), step
        kept += any(KEPT in str(problem) for problem in standing.problems)
        full = max(full, len(now[1].workloads))
    assert kept > 0
    assert full > 4


def test_all_objects_at_once_and_their_differences_are_the_same() -> None:
    rng = Random(1)
    objects = Objects(rng)
    one, other = ClusterState(Cluster()), ClusterState(Cluster())
    given: dict[ObjectKey, KubeObject] = {}
    for _ in range(60):
        changes = objects.changes()
        for key, each in changes.items():
            given.pop(key, None) if each is None else given.__setitem__(key, each)
        by_changes = one.change(changes)
        by_all = other.update(ObjectSet(MappingProxyType(dict(given))))
        assert found(by_all)[2:] == found(by_changes)[2:]
        assert in_order(by_all.translation.state) == in_order(by_changes.translation.state)
        assert by_all.objects == by_changes.objects


# --- what it costs ------------------------------------------------------------------

PODS, SERVICES, SPACES = 10_000, 500, 20
LIMIT_S = 0.020


def body(kind: str, namespace: str, name: str, labels: dict[str, str], **rest: Any) -> KubeObject:
    metadata = {"name": name, "namespace": namespace, "labels": labels}
    return KubeObject(ObjectKey("", kind, namespace, name), "v1", {"metadata": metadata, **rest})


def pod(number: int, *, ready: bool = True) -> KubeObject:
    app = number % SERVICES
    address = f"198.18.{number // 250}.{number % 250 + 1}"
    conditions = [{"type": "Ready", "status": str(ready)}]
    return body(
        "Pod",
        f"ns{app % SPACES}",
        f"p{number}",
        {"app": f"a{app}", "version": "v1", "pod-template-hash": "x"},
        spec={"nodeName": "n0", "containers": [{"ports": [{"containerPort": 8080}]}]},
        status={"podIPs": [{"ip": address}], "phase": "Running", "conditions": conditions},
    )


def large() -> Iterator[KubeObject]:
    yield body("Node", "", "n0", {"topology.kubernetes.io/region": "eu"})
    for number in range(SPACES):
        yield body("Namespace", "", f"ns{number}", {"istio.io/dataplane-mode": "ambient"})
    for number in range(SERVICES):
        spec = {
            "selector": {"app": f"a{number}"},
            "clusterIP": f"198.19.{number // 250}.{number % 250 + 1}",
            "ports": [{"name": "http", "port": 80, "targetPort": 8080}],
        }
        yield body("Service", f"ns{number % SPACES}", f"s{number}", {}, spec=spec)
    yield from map(pod, range(PODS))


def seconds(state: ClusterState, *changes: KubeObject) -> tuple[float, Standing]:
    begun = time.perf_counter()
    standing = state.change({each.key: each for each in changes})
    return time.perf_counter() - begun, standing


def test_one_pods_change_among_ten_thousand_costs_that_pod() -> None:
    state = ClusterState(Cluster())
    whole_s, _ = seconds(state, *large())
    took = []
    for number in range(10):
        one_s, standing = seconds(state, pod(number, ready=False))
        took.append(one_s)
        assert [each.name for each in standing.delta.workloads] == [f"p{number}"]
        assert len(standing.delta) == 1
        assert len(standing.translation.state.workloads) == PODS
    typical_s = sorted(took)[len(took) // 2]
    assert typical_s < LIMIT_S
    assert typical_s < whole_s / 20


def test_a_services_change_costs_the_pods_that_it_selects() -> None:
    state = ClusterState(Cluster())
    seconds(state, *large())
    ports = [{"name": "http", "port": 81, "targetPort": 8080}]
    spec = {"selector": {"app": "a7"}, "clusterIP": "198.19.0.8", "ports": ports}
    took_s, standing = seconds(state, body("Service", "ns7", "s7", {}, spec=spec))
    assert len(standing.delta.workloads) == PODS // SERVICES
    assert len(standing.delta.services) == 1
    assert took_s < LIMIT_S


def test_a_nodes_heartbeat_and_a_namespaces_status_cost_nothing() -> None:
    state = ClusterState(Cluster())
    seconds(state, *large())
    beat = body("Node", "", "n0", {"topology.kubernetes.io/region": "eu"}, status={"beat": 2})
    space = body("Namespace", "", "ns1", {"istio.io/dataplane-mode": "ambient"}, status={"a": 1})
    took_s, standing = seconds(state, beat, space)
    assert len(standing.delta) == 0
    assert took_s < LIMIT_S
