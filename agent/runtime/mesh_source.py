"""Where mesh state comes from: what each source offers the agent."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from meshbpf.agent.api import StateKind
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.state import MeshState

Apply = Callable[[MeshState], Awaitable[None]]
"""Makes a state the one in force; MeshbpfError when it cannot be."""


@dataclass(frozen=True, slots=True)
class SourceStatistics:
    """Counters since the start."""

    loads: int
    refused: int


class MeshSource(Protocol):
    """One place where mesh state comes from."""

    loaded_at: datetime | None
    """When the content in force was read: what was written later is not in force yet."""
    error: MeshbpfError | None
    """Why the newest content is not in force; None when it is."""

    @property
    def kind(self) -> StateKind:
        """What kind of place it is."""

    @property
    def origin(self) -> str:
        """What to show for the place."""

    @property
    def healthy(self) -> bool:
        """It can be read. A bad content is no illness of the source."""

    def warnings(self) -> tuple[str, ...]:
        """What is wrong with parts of a content that is in force otherwise."""

    def load(self) -> MeshState:
        """The first read, at start, before the event loop: ConfigError says what is wrong."""

    async def watch(self, apply: Apply) -> None:
        """Hand each new good state to `apply`, until cancelled."""

    def statistics(self) -> SourceStatistics:
        """Counters since the start."""
