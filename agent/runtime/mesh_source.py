"""Where mesh state comes from: what each source offers the agent."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import trio

from meshbpf.agent.api import StateKind
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.objects import KubeObject, ObjectSet
from meshbpf.agent.core.state import MeshDelta, MeshState


class MeshWriter(Protocol):
    """Where a source puts what it has (`LiveMesh`)."""

    async def apply(self, state: MeshState) -> None:
        """Make `state` the whole mesh; MeshbpfError when it cannot be, and then nothing changed."""

    async def apply_delta(self, delta: MeshDelta) -> None:
        """Change the mesh by `delta`; MeshbpfError when it cannot be, and then nothing changed."""


@dataclass(frozen=True, slots=True)
class SourceStatistics:
    """Counters since the start."""

    loads: int
    refused: int


class MeshSource(Protocol):
    """One place where mesh state comes from."""

    loaded_at: datetime | None
    """When the content in force was read: what was written later is not in force yet."""

    @property
    def error(self) -> MeshbpfError | None:
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

    @property
    def objects(self) -> ObjectSet | None:
        """The Kubernetes objects in force; None where the source has none."""

    async def find_pod(self, namespace: str, name: str) -> KubeObject | None:
        """One Pod, asked for at its origin where it may be newer than `objects`."""

    def warnings(self) -> tuple[str, ...]:
        """What is wrong with parts of a content that is in force otherwise."""

    def load(self) -> MeshState | None:
        """The first read, at start, before the event loop: ConfigError says what is wrong.

        None where it takes a conversation; `watch` then brings the first state.
        """

    async def watch(
        self, mesh: MeshWriter, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Put each new good state into `mesh`, until cancelled.

        Tells that it has started once a first state is in force, be it from `load`.
        """

    def statistics(self) -> SourceStatistics:
        """Counters since the start."""
