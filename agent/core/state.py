"""What a source of mesh state delivers: plain records, not yet indexed.

A file is read whole (MeshState); a control plane tells of changes (MeshDelta).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from meshbpf.agent.core.policy import Authorization
from meshbpf.agent.core.service import Service
from meshbpf.agent.core.workload import NamespacedHostname, Workload


@dataclass(frozen=True, slots=True)
class MeshState:
    """All of the mesh at one moment. `Snapshot.of` makes it searchable."""

    workloads: tuple[Workload, ...] = ()
    services: tuple[Service, ...] = ()
    policies: tuple[Authorization, ...] = ()


@dataclass(frozen=True, slots=True)
class MeshDelta:
    """A change of the mesh: records that are new or replace one of their key, and keys that go.

    A key that is not there may be removed; a record that is there unchanged
    may be sent. Removals come first, so a key in both is in the mesh after.
    """

    workloads: Collection[Workload] = ()
    services: Collection[Service] = ()
    policies: Collection[Authorization] = ()
    removed_workloads: Collection[str] = ()
    """By uid."""
    removed_services: Collection[NamespacedHostname] = ()
    removed_policies: Collection[str] = ()
    """By key, NAMESPACE/NAME."""

    def __len__(self) -> int:
        return (
            len(self.workloads)
            + len(self.services)
            + len(self.policies)
            + len(self.removed_workloads)
            + len(self.removed_services)
            + len(self.removed_policies)
        )

    @classmethod
    def whole(cls, state: MeshState) -> MeshDelta:
        """What leads from an empty mesh to `state`."""
        return cls(state.workloads, state.services, state.policies)
