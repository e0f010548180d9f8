"""Kubernetes objects as plain data, and a set of them at one moment.

What every reader of objects shares, be they from a directory of manifests or
from the API server: the mesh translator takes Services, Pods and policies out
of the set, the waypoint takes Gateways and routes. The body stays what YAML or
JSON said; whoever needs a kind parses it and reports what is wrong with the
object's own name and field.

The names follow the Kubernetes API conventions (apiVersion, kind, metadata).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple


class ObjectKey(NamedTuple):
    """What names an object in a cluster; `namespace` is empty for cluster-scoped kinds."""

    group: str
    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        place = f"{self.namespace}/{self.name}" if self.namespace else self.name
        return f"{self.kind} {place}"


@dataclass(frozen=True, slots=True)
class KubeObject:
    """One object. `origin` says where to correct it: `mesh.yaml:12`, or `cluster`."""

    key: ObjectKey
    version: str
    """The API version without its group: `v1`, `v1beta1`."""
    body: Mapping[str, Any]
    origin: str = "cluster"

    @property
    def namespace(self) -> str:
        """Empty for cluster-scoped kinds."""
        return self.key.namespace

    @property
    def name(self) -> str:
        """`metadata.name`."""
        return self.key.name

    @property
    def metadata(self) -> Mapping[str, Any]:
        """`metadata`, empty when there is none."""
        return self.body.get("metadata") or {}

    @property
    def labels(self) -> Mapping[str, str]:
        """`metadata.labels`."""
        return self.metadata.get("labels") or {}

    @property
    def annotations(self) -> Mapping[str, str]:
        """`metadata.annotations`."""
        return self.metadata.get("annotations") or {}

    @property
    def spec(self) -> Mapping[str, Any]:
        """`spec`, empty when there is none."""
        return self.body.get("spec") or {}

    def with_labels(self, labels: Mapping[str, str]) -> KubeObject:
        """The same with other labels, for those who ask by them."""
        return replace(self, body={**self.body, "metadata": {**self.metadata, "labels": labels}})


@dataclass(frozen=True, slots=True)
class ObjectSet:
    """All objects at one moment. Immutable; a change makes a new set."""

    EMPTY: ClassVar[ObjectSet]

    by_key: Mapping[ObjectKey, KubeObject] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def of(cls, objects: Iterable[KubeObject]) -> ObjectSet:
        """The last of several objects with one key wins."""
        return cls(MappingProxyType({each.key: each for each in objects}))

    def of_kind(self, group: str, kind: str) -> Iterator[KubeObject]:
        """All objects of a kind, whatever their version, in the order of the source."""
        for key, each in self.by_key.items():
            if key.group == group and key.kind == kind:
                yield each

    def get(self, group: str, kind: str, namespace: str, name: str) -> KubeObject | None:
        """One object by its key."""
        return self.by_key.get(ObjectKey(group, kind, namespace, name))


ObjectSet.EMPTY = ObjectSet()
