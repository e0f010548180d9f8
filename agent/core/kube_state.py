"""The mesh of a cluster over time: an object that turns bad keeps its last good form.

Sources hand over each new set of objects; what they get back is the state to
apply and what to tell people. A broken object that was good before goes on as
it was: a typing error in one policy must not open or close what it guards. One
that was never good gives what the translation says of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from meshbpf.agent.core.kube_cluster import Cluster, Problem
from meshbpf.agent.core.kube_mesh import Translation, translate
from meshbpf.agent.core.objects import ObjectKey, ObjectSet

_KEPT = "its last good form stays in force"


@dataclass(frozen=True, slots=True)
class Standing:
    """The objects in force and what they came to."""

    objects: ObjectSet
    translation: Translation
    problems: tuple[Problem, ...]
    broken: frozenset[ObjectKey]
    """Objects that cannot be read as they are now, whatever stands in for them."""


class ClusterState:
    """Remembers the last good form of each object."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._good = ObjectSet.EMPTY

    def update(self, objects: ObjectSet) -> Standing:
        """Translate `objects`, with the last good form of those that are broken."""
        first = translate(objects, self._cluster)
        kept = {key: self._good.by_key[key] for key in first.broken if key in self._good.by_key}
        if not kept:
            self._remember(objects, first)
            return Standing(objects, first, first.problems, first.broken)
        mended = ObjectSet(MappingProxyType({**objects.by_key, **kept}))
        second = translate(mended, self._cluster)
        self._remember(mended, second)
        told = [
            Problem(p.key, p.field, p.reason, _KEPT, p.origin)
            for p in first.problems
            if p.key in kept
        ]
        return Standing(mended, second, (*told, *second.problems), first.broken)

    def _remember(self, objects: ObjectSet, translation: Translation) -> None:
        good = {k: each for k, each in objects.by_key.items() if k not in translation.broken}
        self._good = ObjectSet(MappingProxyType(good))
