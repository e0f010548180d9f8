"""A map whose copies share all that did not change.

A dictionary in shards, by hash: a new version copies the shards that changed
and the row of shards, and leaves the rest to both. A reader takes two steps
instead of one; a version costs what the change costs, times the size of a
shard. (A hash trie in Python would need several steps more for each lookup,
and lookups are the connection path; figures in ADR 7.)

Versions never change once made, so readers need no lock.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator
from typing import Any, Final, Generic, TypeVar, overload

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
D = TypeVar("D")

# Shards are made this large on average, and made anew when the average leaves
# the range: doubling each time would copy too often, a wide range would make
# single changes dear.
_SHARD_ENTRIES: Final = 16
_FULLEST: Final = 64
_EMPTIEST: Final = 4
# A dictionary places its keys by the low bits of their hashes: keys of one shard
# must not have those in common, so the shard is chosen by higher ones.
_SHIFT: Final = 12
_GONE: Final[Any] = object()


class PersistentMap(Generic[K, V]):
    """One version. Made by `edit().commit()` from another, `EMPTY` being the first."""

    __slots__ = ("_mask", "_shards", "_size")

    def __init__(self, shards: tuple[dict[K, V], ...] = ({},), size: int = 0) -> None:
        self._shards = shards
        self._mask = len(shards) - 1
        self._size = size

    @overload
    def get(self, key: K) -> V | None: ...
    @overload
    def get(self, key: K, default: D) -> V | D: ...
    def get(self, key: K, default: Any = None) -> Any:
        """The value under `key`."""
        return self._shards[hash(key) >> _SHIFT & self._mask].get(key, default)

    def __contains__(self, key: object) -> bool:
        return key in self._shards[hash(key) >> _SHIFT & self._mask]

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[K]:
        for shard in self._shards:
            yield from shard

    def values(self) -> Values[V]:
        """All values, in no order that means anything."""
        return Values(self)

    def edit(self) -> Edit[K, V]:
        """Begin the next version."""
        return Edit(self)


class Values(Collection[V]):
    """The values of a PersistentMap, counted without being walked."""

    __slots__ = ("_of",)

    def __init__(self, of: PersistentMap[Any, V]) -> None:
        self._of = of

    def __len__(self) -> int:
        return len(self._of)

    def __iter__(self) -> Iterator[V]:
        for shard in self._of._shards:
            yield from shard.values()

    def __contains__(self, value: object) -> bool:
        return any(value == one for one in self)


class Edit(Generic[K, V]):
    """Changes to a map that nobody else sees until they are committed."""

    __slots__ = ("_base", "_changes")

    def __init__(self, base: PersistentMap[K, V]) -> None:
        self._base = base
        self._changes: dict[K, V] = {}

    @overload
    def get(self, key: K) -> V | None: ...
    @overload
    def get(self, key: K, default: D) -> V | D: ...
    def get(self, key: K, default: Any = None) -> Any:
        """The value under `key` as it is after the changes so far."""
        found = self._changes.get(key, self)
        if found is self:
            return self._base.get(key, default)
        return default if found is _GONE else found

    def set(self, key: K, value: V) -> None:
        """Set one entry."""
        self._changes[key] = value

    def remove(self, key: K) -> None:
        """Remove one entry, if it is there."""
        self._changes[key] = _GONE

    def commit(self) -> PersistentMap[K, V]:
        """The next version; the very same map when nothing was changed."""
        base, changes = self._base, self._changes
        if not changes:
            return base
        size = base._size
        for key, value in changes.items():
            size += (value is not _GONE) - (key in base)
        average = size / len(base._shards)
        if average > _FULLEST or (average < _EMPTIEST and len(base._shards) > 1):
            return self._spread(size)
        # Shards that were copied already in this commit, by their place.
        shards = list(base._shards)
        copied: set[int] = set()
        mask = base._mask
        for key, value in changes.items():
            place = hash(key) >> _SHIFT & mask
            if place not in copied:
                shards[place] = shards[place].copy()
                copied.add(place)
            if value is _GONE:
                shards[place].pop(key, None)
            else:
                shards[place][key] = value
        return PersistentMap(tuple(shards), size)

    def _spread(self, size: int) -> PersistentMap[K, V]:
        """All entries over a number of shards that fits `size`: linear, and seldom."""
        count = 1 << max(0, (size // _SHARD_ENTRIES).bit_length() - 1)
        mask = count - 1
        shards: tuple[dict[K, V], ...] = tuple({} for _ in range(count))
        for shard in self._base._shards:
            for key, value in shard.items():
                if key not in self._changes:
                    shards[hash(key) >> _SHIFT & mask][key] = value
        for key, value in self._changes.items():
            if value is not _GONE:
                shards[hash(key) >> _SHIFT & mask][key] = value
        return PersistentMap(shards, size)


EMPTY: Final[PersistentMap[Any, Any]] = PersistentMap()
