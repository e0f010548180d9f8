"""Mesh state from the API server, and what the cluster is told in return."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import yaml

from meshbpf.agent.config import PodName
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.kube_cluster import Cluster
from meshbpf.agent.core.state import MeshDelta, MeshState
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import TunnelProtocol
from meshbpf.agent.runtime import kube_status, kube_watch, kubernetes
from meshbpf.agent.runtime.kube_api import KubeApi
from meshbpf.agent.runtime.kube_status import StatusReporter
from meshbpf.agent.runtime.kubernetes import KubernetesSource
from meshbpf.agent.runtime.membership import Member, Membership
from tests.progs.kube_objects import mesh_objects, pod_object
from tests.progs.pod import NAMESPACE, Pod
from tests.unit.kube.api_server import ApiServer, running, serving

A = Pod("a", "", 1, 1, "shop", captured=True)
B = Pod("b", "", 2, 1, "stock", captured=True)
X = Pod("x", "", 1, 2, "legacy", captured=False)
DENY = yaml.safe_load("""
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: apps}
spec: {action: DENY, rules: [{to: [{operation: {ports: ["80"]}}]}]}
""")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kube_watch, "RETRY_FIRST_S", 0.01)
    monkeypatch.setattr(kubernetes, "SETTLE_S", 0.02)


class Mesh:
    """Takes the states, and refuses one when told to."""

    def __init__(self) -> None:
        self.states: list[MeshState] = []
        self.deltas: list[MeshDelta] = []
        self.refuses = False

    async def apply(self, state: MeshState) -> None:
        if self.refuses:
            raise MeshbpfError("map-full", "too many destinations")
        self.states.append(state)

    async def apply_delta(self, delta: MeshDelta) -> None:
        if self.refuses:
            raise MeshbpfError("map-full", "too many destinations")
        self.deltas.append(delta)
        mesh = Snapshot.EMPTY.after(MeshDelta.whole(self.states[-1]), 1).after(delta, 2)
        self.states.append(
            MeshState(tuple(mesh.workloads), tuple(mesh.services), tuple(mesh.policies))
        )

    @property
    def state(self) -> MeshState:
        return self.states[-1]

    def names(self) -> list[str]:
        return sorted(each.name for each in self.state.workloads)


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(10):
        while not condition():  # noqa: ASYNC110 (a state has no event)
            await trio.sleep(0.01)


@asynccontextmanager
async def cluster(tmp_path: Path) -> AsyncIterator[tuple[ApiServer, KubernetesSource, Mesh]]:
    async with running(tmp_path) as server:
        for body in mesh_objects([A, B, X]):
            if body["kind"] != "ServiceAccount":
                server.put(body)
        source, mesh = KubernetesSource(KubeApi(server.config()), Cluster()), Mesh()
        assert source.load() is None
        assert not source.healthy
        async with trio.open_nursery() as nursery:
            await nursery.start(source.watch, mesh)
            yield server, source, mesh
            nursery.cancel_scope.cancel()


async def test_the_first_state_is_whole_and_later_ones_follow(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (server, source, mesh):
        assert mesh.names() == ["a", "b", "x"]
        assert len(mesh.state.services) == 3
        assert source.healthy
        server.put(DENY)
        await until(lambda: mesh.state.policies)
        server.take("Pod", NAMESPACE, "b")
        await until(lambda: mesh.names() == ["a", "x"])
        server.take("AuthorizationPolicy", NAMESPACE, "p")
        await until(lambda: not mesh.state.policies)


async def test_what_changes_goes_to_the_mesh_as_a_change(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (server, source, mesh):
        assert (len(mesh.states), mesh.deltas) == (1, [])
        server.take("Pod", NAMESPACE, "b")
        await until(lambda: mesh.deltas)
        (delta,) = mesh.deltas
        assert list(delta.removed_workloads) == ["Kubernetes//Pod/apps/b"]
        assert len(delta) == 1
        server.compact()
        server.end_watches()
        server.put(DENY)
        await until(lambda: mesh.state.policies)
        assert [len(each) for each in mesh.deltas] == [1, 1]  # lists anew say what they said
        assert source.objects is not None
        assert source.objects.get("", "Pod", NAMESPACE, "b") is None


async def test_a_burst_of_changes_is_few_states(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (server, _source, mesh):
        before = len(mesh.states)
        for number in range(50):
            server.put(pod_object(Pod(f"p{number}", "", 2, 10 + number, "stock", captured=True)))
        await until(lambda: len(mesh.state.workloads) == 53)
        assert len(mesh.states) - before <= 5


async def test_an_object_that_turns_bad_keeps_its_last_good_form(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (server, source, mesh):
        server.put(DENY)
        await until(lambda: mesh.state.policies)
        good = mesh.state.policies
        rule = {"to": [{"operation": {"ports": ["http"]}}]}
        server.put(DENY | {"spec": {"action": "DENY", "rules": [rule]}})
        await until(source.warnings)
        assert mesh.state.policies == good
        assert (
            "AuthorizationPolicy apps/p: spec.rules[0].to[0].operation.ports[0]"
            in (source.warnings()[0])
        )


async def test_a_state_that_is_refused_is_told_and_the_next_one_offered(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (server, source, mesh):
        mesh.refuses = True
        server.take("Pod", NAMESPACE, "b")
        await until(lambda: source.error is not None)
        mesh.refuses = False
        server.take("Pod", NAMESPACE, "x")
        await until(lambda: mesh.names() == ["a"])
        assert source.error is None
        assert mesh.deltas == []  # what was refused is a part of the whole that was taken
        server.put(pod_object(B))
        await until(lambda: mesh.names() == ["a", "b"])
        assert [len(each) for each in mesh.deltas] == [1]


async def test_the_source_is_ill_once_the_server_is_away_for_longer_than_the_grace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes, "GRACE_S", 0.3)
    async with running(tmp_path) as server:
        port = server.port
    source, mesh = KubernetesSource(KubeApi(server.config()), Cluster()), Mesh()
    async with trio.open_nursery() as nursery:
        async with serving(server, port):
            await nursery.start(source.watch, mesh)
            assert source.healthy
        await until(lambda: source.warnings())
        assert source.healthy  # a moment is no illness
        await until(lambda: not source.healthy)
        async with serving(server, port):
            await until(lambda: source.healthy)
        nursery.cancel_scope.cancel()


async def test_membership_is_by_label_and_a_pod_that_the_watch_does_not_have_is_asked_for(
    tmp_path: Path,
) -> None:
    async with cluster(tmp_path) as (server, source, _mesh):
        membership = Membership(source, lambda: Snapshot.EMPTY, "node1")
        assert await membership.of(PodName(NAMESPACE, "a")) == Member(
            PodName(NAMESPACE, "a"), "shop"
        )
        assert await membership.of(PodName(NAMESPACE, "x")) is None
        assert [str(each.name) for each in membership.here()] == ["apps/a"]
        # Put behind the watch's back: CNI asks in the moment in which a pod is made.
        server.objects["Pod", NAMESPACE, "new"] = pod_object(
            Pod("new", "", 1, 9, "fresh", captured=True)
        )
        assert await membership.of(PodName(NAMESPACE, "new")) == Member(
            PodName(NAMESPACE, "new"), "fresh"
        )
        with pytest.raises(MeshbpfError, match="nobody knows pod apps/stranger"):
            await membership.of(PodName(NAMESPACE, "stranger"))
        assert await membership.of(PodName("elsewhere", "stranger")) is None


async def test_the_annotation_says_what_is_steered_and_only_of_this_nodes_pods(
    tmp_path: Path,
) -> None:
    async with cluster(tmp_path) as (server, source, mesh):
        steered = {"apps/a", "apps/b"}
        reporter = StatusReporter(source, "node1", lambda: steered)
        await reporter.look()
        key = "ambient.istio.io/redirection"
        path = "/api/v1/namespaces/apps/pods/a/status"
        assert server.patches == [(path, {"metadata": {"annotations": {key: "enabled"}}})]

        def tunnels() -> list[str]:
            hbone = TunnelProtocol.HBONE
            return [w.name for w in mesh.state.workloads if w.tunnel_protocol is hbone]

        await until(lambda: tunnels() == ["a"])
        await reporter.look()
        assert len(server.patches) == 1
        steered.clear()
        await reporter.look()
        assert server.patches[1:] == [(path, {"metadata": {"annotations": {key: None}}})]
        await until(lambda: tunnels() == [])


async def test_a_pod_that_cni_enrols_is_told_of_at_once_and_only_once(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (server, source, mesh):
        reporter = StatusReporter(source, "node1", lambda: {"apps/a"})
        await reporter.announce(PodName("apps", "a"))
        assert [path for path, _ in server.patches] == ["/api/v1/namespaces/apps/pods/a/status"]
        # What was told has not come back by the watch yet, perhaps.
        await reporter.look()
        assert len(server.patches) == 1
        await until(
            lambda: (
                [w.name for w in mesh.state.workloads if w.tunnel_protocol is TunnelProtocol.HBONE]
                == ["a"]
            )
        )


async def test_an_api_server_that_is_slow_holds_up_no_start_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kube_status, "ANNOUNCE_S", 0.1)
    async with cluster(tmp_path) as (server, source, _mesh):

        async def never(*_: object) -> None:
            await trio.sleep_forever()

        with monkeypatch.context() as slow:
            slow.setattr(source.api, "patch_status", never)
            reporter = StatusReporter(source, "node1", lambda: {"apps/a"})
            with trio.fail_after(2):
                await reporter.announce(PodName("apps", "a"))
        assert server.patches == []
        await reporter.look()
        assert len(server.patches) == 1, "it is told of when the server answers again"
