"""What a cluster's objects have come to: records and complaints, and what changed among them."""

from __future__ import annotations

from collections.abc import Hashable
from enum import IntEnum, auto
from typing import Generic, TypeVar

from meshbpf.agent.core.kube_cluster import Problem, Problems
from meshbpf.agent.core.objects import ObjectKey
from meshbpf.agent.core.policy import Authorization
from meshbpf.agent.core.service import Service
from meshbpf.agent.core.state import MeshDelta, MeshState
from meshbpf.agent.core.workload import NamespacedHostname, Workload

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")


class Table(Generic[K, R]):
    """Records by key, and what each was when its changes were last taken."""

    def __init__(self) -> None:
        self.records: dict[K, R] = {}
        self._before: dict[K, R | None] = {}

    def set(self, key: K, record: R | None) -> None:
        """Let `record` stand under `key`; None takes away what stands there."""
        self._before.setdefault(key, self.records.get(key))
        if record is None:
            self.records.pop(key, None)
        else:
            self.records[key] = record

    def changes(self) -> tuple[list[R], list[K]]:
        """Records that are new or other than when this was last asked, and keys that are gone."""
        changed: list[R] = []
        gone: list[K] = []
        for key, before in self._before.items():
            now = self.records.get(key)
            if now is None:
                if before is not None:
                    gone.append(key)
            elif now != before:
                changed.append(now)
        self._before.clear()
        return changed, gone


class Outcome:
    """The mesh state of a cluster, as far as it is translated."""

    def __init__(self) -> None:
        self.workloads: Table[str, Workload] = Table()
        self.services: Table[NamespacedHostname, Service] = Table()
        self.policies: Table[str, Authorization] = Table()

    @property
    def state(self) -> MeshState:
        """All of it."""
        return MeshState(
            tuple(self.workloads.records.values()),
            tuple(self.services.records.values()),
            tuple(self.policies.records.values()),
        )

    def delta(self) -> MeshDelta:
        """What changed since this was last asked."""
        workloads, removed_workloads = self.workloads.changes()
        services, removed_services = self.services.changes()
        policies, removed_policies = self.policies.changes()
        return MeshDelta(
            workloads,
            services,
            policies,
            removed_workloads,
            removed_services,
            removed_policies,
        )


class Step(IntEnum):
    """Of the translation; complaints are told in this order, causes first."""

    WAYPOINTS = auto()
    CLAIMS = auto()
    HOSTNAMES = auto()
    POLICIES = auto()
    PEERS = auto()
    WORKLOADS = auto()


class Ledger:
    """The complaints of each step about each object or name; taken again, they replace the old."""

    def __init__(self) -> None:
        self._steps: dict[tuple[Step, ObjectKey | str], Problems] = {}
        self._sorted: tuple[Problem, ...] | None = None
        self._broken: frozenset[ObjectKey] | None = None

    def put(self, step: Step, about: ObjectKey | str, problems: Problems) -> None:
        """What a step complains of; nothing, where all is well or gone."""
        if problems.found:
            self._steps[step, about] = problems
        elif self._steps.pop((step, about), None) is None:
            return
        self._sorted = self._broken = None

    @property
    def problems(self) -> tuple[Problem, ...]:
        """All of them, by step, object and field."""
        if self._sorted is None:
            every = [(at, one) for (at, _), each in self._steps.items() for one in each.found]
            every.sort(key=lambda pair: (pair[0], pair[1].key, pair[1].field, pair[1].reason))
            self._sorted = tuple(one for _, one in every)
        return self._sorted

    @property
    def broken(self) -> frozenset[ObjectKey]:
        """The objects that gave nothing."""
        if self._broken is None:
            self._broken = frozenset().union(*(each.broken for each in self._steps.values()))
        return self._broken
