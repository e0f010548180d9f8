"""A cluster's objects as mesh state: what istiod would send to a node proxy.

Pure: objects in, state and complaints out. One translation serves every source
of objects, a directory of manifests and the API server alike; this is the form
for those that have all objects at once. kube_translator.py holds the rules, and
follows changes.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshbpf.agent.core.kube_cluster import Cluster, Problem
from meshbpf.agent.core.kube_translator import KINDS, Translator
from meshbpf.agent.core.objects import ObjectKey, ObjectSet
from meshbpf.agent.core.state import MeshState

__all__ = ["KINDS", "Translation", "translate"]


@dataclass(frozen=True, slots=True)
class Translation:
    """What a cluster's objects came to."""

    state: MeshState
    problems: tuple[Problem, ...]
    broken: frozenset[ObjectKey]
    """Those that could not be read at all."""


def translate(objects: ObjectSet, cluster: Cluster) -> Translation:
    """The mesh state of `objects`. A bad object costs itself alone."""
    translator = Translator(cluster)
    translator.change(objects.by_key)
    return Translation(translator.state, translator.problems, translator.broken)
