"""Which objects another means by its `matchLabels`, found without asking each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")


def has_all(wanted: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether all of `wanted` is among `labels`."""
    return all(labels.get(key) == value for key, value in wanted.items())


class SelectorIndex(Generic[T]):
    """Finds whose selector means an object, by one label of each selector."""

    def __init__(self, entries: Iterable[tuple[str, Mapping[str, str], T]]) -> None:
        """Of (namespace, selector, item); those with an empty selector select nothing."""
        self._by_label: dict[tuple[str, str, str], list[tuple[Mapping[str, str], T]]] = defaultdict(
            list
        )
        for namespace, wanted, item in entries:
            if wanted:
                key, value = next(iter(wanted.items()))
                self._by_label[namespace, key, value].append((wanted, item))

    def of(self, namespace: str, labels: Mapping[str, str]) -> list[T]:
        """The items of `namespace` that select an object with these labels."""
        return [
            item
            for key, value in labels.items()
            for wanted, item in self._by_label.get((namespace, key, value), ())
            if has_all(wanted, labels)
        ]
