"""Fields of the waypoint's objects, whose complaints become conditions of their status."""

from __future__ import annotations

from typing import Self

from meshbpf.agent.core import object_fields
from meshbpf.agent.l7.problem import ObjectError


class Value(object_fields.Value):
    """One value of an object, and where it stands."""

    __slots__ = ()

    def error(self, reason: str) -> ObjectError:
        """The complaint about this field; the caller raises it."""
        return ObjectError(self.path, reason)

    def fields(self) -> dict[str, Self]:
        """The fields of a mapping that are not null; unknown ones are somebody else's."""
        return {
            key: type(self)(self.object, child.raw, f"{self.path}.{key}")
            for key, child in self.entries()
            if child.raw is not None
        }
