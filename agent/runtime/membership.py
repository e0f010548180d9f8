"""Which pods of this node the mesh state, or their labels, put into the mesh.

Where the source has Kubernetes objects, labels decide (core/kube_enrolment.py);
where it has only workloads, a pod is in the mesh when its workload speaks
HBONE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from meshbpf.agent.config import PodName
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.kube_enrolment import enrolment
from meshbpf.agent.core.kube_names import AMBIENT, CORE, DATAPLANE_MODE
from meshbpf.agent.core.kube_pods import TERMINAL
from meshbpf.agent.core.objects import KubeObject, ObjectSet
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import DEFAULT_SERVICE_ACCOUNT, TunnelProtocol
from meshbpf.agent.runtime.mesh_source import MeshSource


@dataclass(frozen=True, slots=True)
class Member:
    """A pod that belongs into the mesh, and whose certificate it gets."""

    name: PodName
    account: str


class Membership:
    """Answers for one agent."""

    def __init__(self, source: MeshSource, mesh: Callable[[], Snapshot], node: str) -> None:
        self._source = source
        self._mesh = mesh
        self._node = node

    async def of(self, name: PodName) -> Member | None:
        """Whether a pod that is being made belongs into the mesh.

        MeshbpfError where its namespace is enrolled and nobody knows the pod:
        to start it outside the mesh would be to guess.
        """
        objects = self._source.objects
        if objects is None:
            return self._of_mesh(name)
        pod = await self._source.find_pod(name.namespace, name.name)
        if pod is not None:
            return _member(pod, self._source.objects or objects)
        if _labels(objects, name.namespace).get(DATAPLANE_MODE) == AMBIENT:
            raise MeshbpfError(
                "unknown-pod",
                f"namespace {name.namespace} is enrolled, and nobody knows pod {name}: "
                "neither its labels nor its service account",
                f"the mesh state comes from {self._source.origin}: let it name the pod",
            )
        return None

    def here(self) -> Iterator[Member]:
        """The pods of this node that belong into the mesh and have a network by now."""
        objects = self._source.objects
        if objects is None:
            for workload in self._mesh().workloads:
                name = PodName(workload.namespace, workload.name)
                member = self._of_mesh(name) if workload.node == self._node else None
                if member is not None:
                    yield member
            return
        for pod in objects.of_kind(CORE, "Pod"):
            status = pod.body.get("status") or {}
            runs = bool(status.get("podIP") or status.get("podIPs"))
            if pod.spec.get("nodeName") != self._node or not runs:
                continue
            if status.get("phase") in TERMINAL:
                continue
            member = _member(pod, objects)
            if member is not None:
                yield member

    def _of_mesh(self, name: PodName) -> Member | None:
        for workload in self._mesh().workload_named(name.namespace, name.name):
            if workload.node == self._node and workload.tunnel_protocol is TunnelProtocol.HBONE:
                return Member(name, workload.service_account)
        return None


def _member(pod: KubeObject, objects: ObjectSet) -> Member | None:
    if not enrolment(pod, _labels(objects, pod.namespace)).enrolled:
        return None
    account = str(pod.spec.get("serviceAccountName") or DEFAULT_SERVICE_ACCOUNT)
    return Member(PodName(pod.namespace, pod.name), account)


def _labels(objects: ObjectSet, namespace: str) -> dict[str, str]:
    found = objects.get(CORE, "Namespace", "", namespace)
    return {} if found is None else dict(found.labels)
