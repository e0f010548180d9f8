"""What the waypoint goes by: mesh state, objects, and the plan compiled from both.

All three change together. A request that has begun ends under the plan that
it began with; the next one of the same connection meets the new one.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from meshbpf.agent.core.address import IPAddress
from meshbpf.agent.core.objects import ObjectSet
from meshbpf.agent.core.service import Service
from meshbpf.agent.core.state import MeshDelta, MeshState
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.store_delta import delta_to
from meshbpf.agent.core.waypoint import all_waypoints, is_waypoint
from meshbpf.agent.core.workload import TunnelProtocol, Workload
from meshbpf.agent.l7.plan import EMPTY, WaypointPlan
from meshbpf.agent.l7.planner import Planner
from meshbpf.agent.l7.problem import Problem
from meshbpf.agent.runtime.logs import Log

log = Log("waypoint")


class LiveState:
    """The state in force; where a mesh source writes."""

    def __init__(
        self,
        planner: Planner,
        objects: Callable[[], ObjectSet],
        *,
        namespace: str,
        name: str,
        service_account: str,
        trust_domain: str,
        network: str,
        addresses: tuple[IPAddress, ...],
    ) -> None:
        self._planner = planner
        self._objects = objects
        self._writing = trio.Lock()
        self._network = network
        self._addresses = addresses
        self._listeners: list[Callable[[Snapshot], None]] = []
        self._reported: frozenset[Problem] = frozenset()
        self._stand_in = Workload(
            uid=f"//waypoint/{namespace}/{name}",
            name=name,
            namespace=namespace,
            addresses=addresses,
            network=network,
            tunnel_protocol=TunnelProtocol.HBONE,
            trust_domain=trust_domain,
            service_account=service_account,
            workload_name=name,
            workload_type="deployment",
            canonical_name=name,
        )
        self.mesh = Snapshot.EMPTY
        self.plan: WaypointPlan = EMPTY
        self.own = self._stand_in
        """Ourselves: as the mesh state has us, else as our options say."""

    @property
    def identity(self) -> Workload:
        """Under whose identity we stand, whatever the mesh state says."""
        return self._stand_in

    def on_change(self, listener: Callable[[Snapshot], None]) -> None:
        """Call `listener` when a new state is in force."""
        self._listeners.append(listener)

    async def apply(self, state: MeshState) -> None:
        """Make `state` the whole mesh. Raises MeshbpfError, and then the old one stays."""
        async with self._writing:
            delta = await trio.to_thread.run_sync(delta_to, self.mesh, state)
            await self._apply(delta)

    async def apply_delta(self, delta: MeshDelta) -> None:
        """Change the mesh by `delta`, whole. Raises MeshbpfError, and then nothing has changed."""
        async with self._writing:
            await self._apply(delta)

    async def _apply(self, delta: MeshDelta) -> None:
        mesh, own, plan = await trio.to_thread.run_sync(self._prepare, delta)
        self.mesh, self.own, self.plan = mesh, own, plan
        self._report(plan)
        for listener in self._listeners:
            listener(mesh)

    def _prepare(self, delta: MeshDelta) -> tuple[Snapshot, Workload, WaypointPlan]:
        mesh = self.mesh.after(delta, self.mesh.version + 1)
        own = self._find_own(mesh)
        plan = self._planner.plan(self._objects(), mesh, lambda service: _bound(mesh, own, service))
        return mesh, own, plan

    def _find_own(self, mesh: Snapshot) -> Workload:
        for address in self._addresses:
            found = mesh.workload_at(self._network, address)
            if found is not None and found.identity == self._stand_in.identity:
                return found
        return self._stand_in

    def _report(self, plan: WaypointPlan) -> None:
        """Each problem once, when it appears and when it is over."""
        found = frozenset(plan.problems)
        for problem in plan.problems:
            if problem not in self._reported:
                log.warning("object not in force as written", cause=problem)
        for problem in self._reported - found:
            log.info("no longer wrong", object=problem.key, field=problem.field)
        self._reported = found
        log.info("plan in force", version=plan.version, services=len(plan.services))


def _bound(mesh: Snapshot, own: Workload, service: Service) -> bool:
    return any(is_waypoint(mesh, own, gateway) for gateway in all_waypoints(service))
