"""Pauses between attempts: doubled each time, up to a limit, and spread.

Spread, because a hundred nodes that lost one server must not come back to it
in step.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

SPREAD = 0.2


@dataclass(slots=True)
class Backoff:
    """`next_s` is each time about twice the last; `reset` after a success."""

    first_s: float
    most_s: float
    rng: random.Random = field(default_factory=random.Random)
    _pause_s: float = 0.0

    def next_s(self) -> float:
        """How long to pause before the next attempt."""
        self._pause_s = min(max(self._pause_s * 2, self.first_s), self.most_s)
        return self._pause_s * self.rng.uniform(1 - SPREAD, 1 + SPREAD)

    def reset(self) -> None:
        """It worked: the next pause is a short one again."""
        self._pause_s = 0.0
