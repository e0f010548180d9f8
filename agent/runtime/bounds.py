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
"""

from __future__ import annotations

import resource
from dataclasses import dataclass

DESCRIPTORS_EACH = 2
SCARCE = 0.8
"""Of all descriptors; the rest is for files, listeners, and pods with little."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The rules, with their numbers."""

    descriptors: int
    per_pod: int = 0

    @classmethod
    def of_process(cls, per_pod: int = 0) -> Bounds:
        """With the limit of this process."""
        soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return cls(soft, per_pod)

    def admits(self, mine: int, total: int, pods: int) -> bool:
        """Whether a pod with `mine` of `total` connections, one of `pods`, may have one more."""
        if self.per_pod and mine >= self.per_pod:
            return False
        room = int(self.descriptors * SCARCE) // DESCRIPTORS_EACH
        return total < room or mine < room // max(pods, 1)
