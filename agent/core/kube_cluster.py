"""What the translation of a cluster's objects must know beside them, and its complaints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from meshbpf.agent.core.identity import DEFAULT_TRUST_DOMAIN
from meshbpf.agent.core.object_fields import ObjectError
from meshbpf.agent.core.objects import KubeObject, ObjectKey
from meshbpf.agent.core.workload import DEFAULT_CLUSTER, NamespacedHostname


@dataclass(frozen=True, slots=True)
class Cluster:
    """The settings that Istio's control plane holds for its cluster, with its defaults."""

    cluster_id: str = DEFAULT_CLUSTER
    network: str = ""
    trust_domain: str = DEFAULT_TRUST_DOMAIN
    domain: str = "cluster.local"
    root_namespace: str = "istio-system"
    by_hand: bool = False
    """The objects are written by a person: no kubelet says that a pod is ready, no
    controller that a Gateway has an address, nobody annotates what was enrolled."""

    def service_key(self, namespace: str, name: str) -> NamespacedHostname:
        """The key under which the mesh knows a Kubernetes Service."""
        return NamespacedHostname(namespace, f"{name}.{namespace}.svc.{self.domain}")


@dataclass(frozen=True, slots=True)
class Problem:
    """One object that cannot be used as it is written, and what became of it."""

    key: ObjectKey
    field: str
    reason: str
    consequence: str
    origin: str = "cluster"

    def __str__(self) -> str:
        place = f"{self.origin}: " if self.origin != "cluster" else ""
        return f"{place}{self.key}: {self.field}: {self.reason} ({self.consequence})"


class Problems:
    """Collects them while a cluster is translated."""

    def __init__(self) -> None:
        self.found: list[Problem] = []
        self.broken: set[ObjectKey] = set()
        """Objects that gave nothing, whose last good form should stand in."""

    def reject(self, error: ObjectError, origin: str, consequence: str) -> None:
        """An object that could not be read at all."""
        self.broken.add(error.key)
        self.found.append(Problem(error.key, error.field, error.reason, consequence, origin))

    def note(self, owner: KubeObject, field: str, reason: str, consequence: str) -> None:
        """An object that is used, but not wholly."""
        self.found.append(Problem(owner.key, field, reason, consequence, owner.origin))


def age(each: KubeObject) -> tuple[str, ObjectKey]:
    """Sorts the oldest first; those without a time after them, by name."""
    # RFC 3339 in UTC: as text it sorts as time.
    return str(each.metadata.get("creationTimestamp") or "~"), each.key


def by_age(objects: Iterable[KubeObject]) -> Iterator[KubeObject]:
    """Oldest first, as Istio settles conflicts."""
    return iter(sorted(objects, key=age))
