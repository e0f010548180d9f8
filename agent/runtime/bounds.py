"""How many connections a pod may have, so that none keeps the others out.

Descriptors are what runs out: an accepted connection takes one, the leg beyond
it another, and a process has a fixed number. Two rules, both asked when a
connection is accepted:

- a pod has at most `per_pod` accepted connections at a time (a setting; 0: no
  such bound);
- once most descriptors are in use, a pod that has more than its share of them
  (all, divided by the pods that are served) takes none in, until it has less.
  The rest stays for those who have little.

A connection that is not admitted is closed with a reset at once: its client
learns it in the same moment, where a full queue would let it wait.

Memory is what a slow reader takes: of each stream as much as its window waits
here until the app takes it. A pod whose streams hold more than `memory_bytes`
together loses those that hold most, until the rest fits.
"""

from __future__ import annotations

import resource
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

DESCRIPTORS_EACH = 2
SCARCE = 0.8
"""Of all descriptors; the rest is for files, listeners, and pods with little."""

Holder = TypeVar("Holder")


@dataclass(frozen=True, slots=True)
class Bounds:
    """The rules, with their numbers."""

    descriptors: int
    per_pod: int = 0
    memory_bytes: int = 0
    """0: no such bound."""

    @classmethod
    def of_process(cls, per_pod: int = 0, memory_bytes: int = 0) -> Bounds:
        """With the limit of this process."""
        soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return cls(soft, per_pod, memory_bytes)

    def admits(self, mine: int, total: int, pods: int) -> bool:
        """Whether a pod with `mine` of `total` connections, one of `pods`, may have one more."""
        if self.per_pod and mine >= self.per_pod:
            return False
        room = int(self.descriptors * SCARCE) // DESCRIPTORS_EACH
        return total < room or mine < room // max(pods, 1)

    def excess(self, held: Iterable[tuple[int, Holder]]) -> list[Holder]:
        """Of the holders of a pod's bytes, those that must let go: the greatest first."""
        if not self.memory_bytes:
            return []
        holders = sorted(held, key=lambda one: one[0], reverse=True)
        over = sum(size for size, _ in holders) - self.memory_bytes
        found = []
        for size, holder in holders:
            if over <= 0:
                break
            found.append(holder)
            over -= size
        return found
