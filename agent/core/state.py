"""What a source of mesh state delivers: plain records, not yet indexed."""

from __future__ import annotations

from dataclasses import dataclass

from meshbpf.agent.core.policy import Authorization
from meshbpf.agent.core.service import Service
from meshbpf.agent.core.workload import Workload


@dataclass(frozen=True, slots=True)
class MeshState:
    """All of the mesh at one moment. `Snapshot.of` makes it searchable."""

    workloads: tuple[Workload, ...] = ()
    services: tuple[Service, ...] = ()
    policies: tuple[Authorization, ...] = ()
