"""The mesh of a cluster over time: an object that turns bad keeps its last good form.

Sources hand over what changed among their objects, or each new set of them;
what they get back is the state to apply and what to tell people. A broken
object that was good before goes on as it was: a typing error in one policy must
not open or close what it guards. One that was never good gives what the
translation says of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from meshbpf.agent.core.kube_cluster import Cluster, Problem
from meshbpf.agent.core.kube_mesh import Translation
from meshbpf.agent.core.kube_translator import Translator
from meshbpf.agent.core.objects import KubeObject, ObjectKey, ObjectSet
from meshbpf.agent.core.state import MeshDelta

_KEPT = "its last good form stays in force"


@dataclass(frozen=True, slots=True)
class Standing:
    """The objects in force and what they came to."""

    objects: ObjectSet
    translation: Translation
    delta: MeshDelta
    """How the state differs from that of the standing before."""
    problems: tuple[Problem, ...]
    broken: frozenset[ObjectKey]
    """Objects that cannot be read as they are now, whatever stands in for them."""


class ClusterState:
    """Remembers the last good form of each object."""

    def __init__(self, cluster: Cluster) -> None:
        self._translator = Translator(cluster)
        self._force: dict[ObjectKey, KubeObject] = {}
        self._bad: dict[ObjectKey, KubeObject] = {}
        """Broken forms in whose place a good one is in force."""

    def update(self, objects: ObjectSet) -> Standing:
        """Make these all the objects."""
        given = {**self._force, **self._bad}
        changes: dict[ObjectKey, KubeObject | None] = dict.fromkeys(given.keys() - objects.by_key)
        for key, each in objects.by_key.items():
            if given.get(key) is not each:
                changes[key] = each
        return self.change(changes)

    def change(self, changes: Mapping[ObjectKey, KubeObject | None]) -> Standing:
        """Take in objects that are new or other than before; None for those that are gone.

        The cost follows what depends on them, but for a copy of the table of all objects.
        """
        # What was broken is tried again: what it depends on may be what has changed.
        tried = {**self._bad, **changes}
        before = {key: self._force.get(key) for key in tried}
        were_broken = self._translator.broken
        self._put(tried)
        broken = self._translator.broken
        kept: dict[ObjectKey, KubeObject | None] = {}
        for key in broken:
            good = before.get(key)
            if good is not None and key not in were_broken and good is not self._force[key]:
                kept[key] = good
        told = [
            Problem(p.key, p.field, p.reason, _KEPT, p.origin)
            for p in self._translator.problems
            if p.key in kept
        ]
        self._bad = {key: self._force[key] for key in kept}
        if kept:
            self._put(kept)
        translator = self._translator
        return Standing(
            ObjectSet(MappingProxyType(self._force.copy())),
            Translation(translator.state, translator.problems, translator.broken),
            translator.delta(),
            (*told, *translator.problems),
            broken,
        )

    def _put(self, changes: Mapping[ObjectKey, KubeObject | None]) -> None:
        for key, each in changes.items():
            if each is None:
                self._force.pop(key, None)
            else:
                self._force[key] = each
        self._translator.change(changes)
