"""The objects of a cluster as its translation looks them up: by kind and by namespace."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

from meshbpf.agent.core.kube_names import CORE
from meshbpf.agent.core.objects import KubeObject, ObjectKey

_NONE: Mapping[ObjectKey, KubeObject] = MappingProxyType({})
_NO_LABELS: Mapping[str, str] = MappingProxyType({})


class Catalogue:
    """Holds the objects of some kinds, and knows no others."""

    def __init__(self, kinds: Iterable[tuple[str, str, str]]) -> None:
        """`kinds` as (group, version, kind); objects are held whatever their version."""
        self._kinds: dict[tuple[str, str], dict[ObjectKey, KubeObject]] = {
            (group, kind): {} for group, _version, kind in kinds
        }
        self._spaces: dict[str, dict[ObjectKey, None]] = defaultdict(dict)

    def knows(self, key: ObjectKey) -> bool:
        """Whether objects of this kind are held."""
        return key[:2] in self._kinds

    def put(self, key: ObjectKey, new: KubeObject | None) -> KubeObject | None:
        """Hold `new` under `key`, or nothing any more; gives what was held before."""
        table = self._kinds[key[:2]]
        if new is not None:
            old = table.get(key)
            table[key] = new
            self._spaces[key.namespace][key] = None
            return old
        old = table.pop(key, None)
        if old is not None:
            del self._spaces[key.namespace][key]
        return old

    def get(self, key: ObjectKey) -> KubeObject | None:
        """One object."""
        return self._kinds[key[:2]].get(key)

    def of_kind(self, group: str, kind: str) -> Mapping[ObjectKey, KubeObject]:
        """All objects of a kind."""
        return self._kinds.get((group, kind), _NONE)

    def spaces(self) -> Iterable[str]:
        """The names of the namespaces that objects are in, and the empty one."""
        return tuple(self._spaces)

    def within(self, namespace: str) -> Collection[ObjectKey]:
        """The keys of all objects in a namespace."""
        return self._spaces.get(namespace, ())

    def namespace(self, name: str) -> KubeObject | None:
        """A Namespace by its name."""
        return self._kinds[CORE, "Namespace"].get(ObjectKey(CORE, "Namespace", "", name))

    def namespace_labels(self, name: str) -> Mapping[str, str]:
        """Its labels; none where the Namespace itself is not known."""
        found = self.namespace(name)
        return _NO_LABELS if found is None else found.labels
