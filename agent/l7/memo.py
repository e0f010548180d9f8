"""Reading each object once, though every destination asks for it.

A waypoint may serve a thousand services under a thousand policies; a source
is asked for each service, and again whenever any object changes. What was read
of an object stays for as long as the object itself does; what it said while it
was good, until it is good again or gone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from meshbpf.agent.core.objects import KubeObject, ObjectKey, ObjectSet
from meshbpf.agent.l7.problem import ObjectError
from meshbpf.agent.l7.sources import Scope

T = TypeVar("T")

_MEMO = ("memo",)


class Memo:
    """What was read of the objects that are in force."""

    def __init__(self) -> None:
        self._objects: ObjectSet | None = None
        self._read: dict[tuple[Any, ObjectKey], tuple[KubeObject, Any]] = {}
        self._good: dict[tuple[Any, ObjectKey], Any] = {}
        self._made: dict[Hashable, Any] = {}

    def turn(self, objects: ObjectSet) -> None:
        """Forget what is not of these objects."""
        if objects is not self._objects:
            self._objects = objects
            self._made.clear()
            self._read = {
                key: found
                for key, found in self._read.items()
                if objects.by_key.get(found[0].key) is found[0]
            }
            self._good = {key: ok for key, ok in self._good.items() if key[1] in objects.by_key}

    def every(self, group: str, kind: str) -> tuple[KubeObject, ...]:
        """All objects of a kind."""
        objects = self._objects or ObjectSet.EMPTY
        return self.make((group, kind), lambda: tuple(objects.of_kind(group, kind)))

    def read(self, each: KubeObject, parse: Callable[[KubeObject], T]) -> T:
        """`parse(each)`, or what it raised."""
        key = (parse, each.key)
        found = self._read.get(key)
        if found is None or found[0] is not each:
            result: Any
            try:
                result = self._good[key] = parse(each)
            except ObjectError as error:
                result = error
            found = self._read[key] = (each, result)
        if isinstance(found[1], ObjectError):
            raise found[1].with_traceback(None)  # which would grow with every raise
        value: T = found[1]
        return value

    def last_good(self, each: KubeObject, parse: Callable[[KubeObject], T]) -> T | None:
        """What `parse` made of the object before it went bad; None when it never was good."""
        found: T | None = self._good.get((parse, each.key))
        return found

    def make(self, key: Hashable, build: Callable[[], T]) -> T:
        """`build()`, once for each set of objects."""
        if key not in self._made:
            self._made[key] = build()
        value: T = self._made[key]
        return value


def memo_of(scope: Scope) -> Memo:
    """The memo of a process, turned to the scope's objects."""
    found: Memo = scope.keep.setdefault(_MEMO, Memo())
    found.turn(scope.objects)
    return found
