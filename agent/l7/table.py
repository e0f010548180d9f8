"""The rules for one port of one service, in order."""

from __future__ import annotations

from collections.abc import Iterable

from meshbpf.agent.l7.match import RequestView
from meshbpf.agent.l7.rules import Entry


class RouteTable:
    """Finds the first entry whose match holds."""

    __slots__ = ("entries",)

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = tuple(sorted(entries, key=lambda each: (each.match.rank, each.age)))

    def find(self, view: RequestView) -> Entry | None:
        """The entry for a request, or None: 404."""
        for each in self.entries:
            if each.match.matches(view):
                return each
        return None
