"""Which objects another means by its `matchLabels`, found without asking each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def has_all(wanted: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether all of `wanted` is among `labels`."""
    return all(labels.get(key) == value for key, value in wanted.items())


class SelectorIndex(Generic[K, T]):
    """Finds whose selector means an object, by one label of each selector."""

    def __init__(self) -> None:
        self._by_label: dict[tuple[str, str, str], dict[K, tuple[Mapping[str, str], T]]] = (
            defaultdict(dict)
        )
        self._places: dict[K, tuple[str, str, str]] = {}

    def put(self, key: K, namespace: str, wanted: Mapping[str, str], item: T) -> None:
        """Let `key` stand for this selector from now on; an empty one selects nothing."""
        self.remove(key)
        if wanted:
            label, value = next(iter(wanted.items()))
            place = self._places[key] = namespace, label, value
            self._by_label[place][key] = wanted, item

    def remove(self, key: K) -> None:
        """Forget the selector of `key`, if there is one."""
        place = self._places.pop(key, None)
        if place is not None:
            del self._by_label[place][key]
            if not self._by_label[place]:
                del self._by_label[place]

    def of(self, namespace: str, labels: Mapping[str, str]) -> list[T]:
        """The items of `namespace` that select an object with these labels."""
        found: list[T] = []
        for label, value in labels.items():
            bucket = self._by_label.get((namespace, label, value))
            if bucket is not None:
                found += [item for wanted, item in bucket.values() if has_all(wanted, labels)]
        return found
