"""What is wrong with an object: which, where in it, why."""

from __future__ import annotations

from dataclasses import dataclass

from meshbpf.agent.core.objects import KubeObject, ObjectKey


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that keeps an object, or a part of it, from being in force.

    `condition` and `reason` are those that a controller writes into the
    object's status (Gateway API: Accepted/ResolvedRefs, NotAllowedByListeners).
    """

    key: ObjectKey
    origin: str
    field: str
    """`spec.rules[0].matches[1].path`."""
    what: str
    condition: str = "Accepted"
    reason: str = "Invalid"

    def __str__(self) -> str:
        place = f": {self.field}" if self.field else ""
        return f"{self.origin}: {self.key}{place}: {self.what}"


class ObjectError(Exception):
    """Raised while one object is read; whoever reads all of them makes a Problem of it."""

    def __init__(
        self, field: str, what: str, *, condition: str = "Accepted", reason: str = "Invalid"
    ) -> None:
        super().__init__(f"{field}: {what}")
        self.field = field
        self.what = what
        self.condition = condition
        self.reason = reason

    def problem(self, about: KubeObject) -> Problem:
        """What to report about the object that was being read."""
        return Problem(about.key, about.origin, self.field, self.what, self.condition, self.reason)
