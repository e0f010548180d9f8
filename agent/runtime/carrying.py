"""The parts that kernel-carried flows need, wired together, and their tasks.

Every few seconds the live flows are looked at: what their sockets have carried
goes to the metrics, and flows whose end no program saw (a hook that was
replaced just then) are forgotten.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import trio

from meshbpf.agent.api import ConnectionInfo
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.datapath.flowcodecs import Flow, FlowState
from meshbpf.agent.datapath.sockdiag import SocketBytes
from meshbpf.agent.datapath.steering import Steering
from meshbpf.agent.runtime.carried_traffic import CarriedTraffic, directions
from meshbpf.agent.runtime.carrier import Carrier
from meshbpf.agent.runtime.local_pod import LocalPod
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.runtime.traffic_metrics import TrafficMetrics

TELL_S: Final = 2.0
"""Between two readings of the counters, and two batches of the access log."""
YOUNG_NS: Final = 2_000_000_000
"""Younger flows are let be: most end by themselves and are counted then."""

log = Log("carrier")

Live = Sequence[tuple[Flow, FlowState]]
Sampled = Mapping[int, SocketBytes]


@dataclass(frozen=True, slots=True)
class CarryingStatistics:
    """What the kernel may carry, and what was ended or not told."""

    verdicts: int
    cut_by_policy: int
    records_dropped: int
    """Connections without a line in the access log."""


class Carrying:
    """One per agent."""

    def __init__(
        self, steering: Steering, mesh: Callable[[], Snapshot], metrics: TrafficMetrics
    ) -> None:
        self._steering = steering
        self._mesh = mesh
        self.traffic = CarriedTraffic(steering.flows, metrics)
        self.carrier = Carrier(steering.flows, steering.destroy_flows, mesh, self.traffic)

    def statistics(self) -> CarryingStatistics:
        """Since the agent started."""
        return CarryingStatistics(
            self.carrier.verdicts, self.carrier.cut, self.traffic.records_dropped
        )

    async def begin(self) -> None:
        """Before any pod is served: nothing that an earlier agent allowed holds any more."""
        await trio.to_thread.run_sync(self._steering.flows.forget_all)
        self._steering.flows.zero_all()

    async def adopt(self) -> None:
        """Once the pods are there: judge the flows that lived on without an agent."""
        self.carrier.doubt_all()
        await self.carrier.settle(adopt=True)

    async def run(self) -> None:
        """Answer the kernel and tell of what it carries, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.carrier.watch)
            nursery.start_soon(self._tell)

    async def _tell(self) -> None:
        idle: set[int] = set()
        while True:
            await trio.sleep(TELL_S)
            try:
                live, sampled = await trio.to_thread.run_sync(self._look, YOUNG_NS)
            except (MeshbpfError, OSError) as error:
                # Metrics that are late are no reason to end an agent.
                log.error("kernel-carried connections cannot be read", cause=error)
                continue
            self.traffic.fold(live, sampled)
            self.traffic.log_ended(TELL_S)
            idle = self._release(idle)

    def _look(self, least_age_ns: int) -> tuple[Live, Sampled]:
        """Live flows and what they have carried; blocking. Forgets those that have ended."""
        flows = self._steering.flows
        now_ns = time.monotonic_ns()
        live = [one for one in flows.live() if now_ns - one[1].opened_ns >= least_age_ns]
        sampled = self._steering.sample_flows(
            [(flow, state.watched_in, state.socket_cookie) for flow, state in live]
        )
        for flow, state in live:
            gone = state.socket_cookie not in sampled and now_ns - state.opened_ns > YOUNG_NS
            # Not if its four numbers have come back meanwhile.
            if gone and flows.state(flow) == state:
                flows.drop(flow, state.watched_in)
        return [one for one in live if one[1].socket_cookie in sampled], sampled

    def _release(self, before: set[int]) -> set[int]:
        """Give back the slots that were idle now and the last time; those that are idle now.

        The verdicts that name them go between the two: a connection that has
        read one by then has counted itself before the second look.
        """
        idle = self.traffic.idle_slots()
        self.traffic.release(before & idle)
        fresh = idle - before
        self.carrier.forget_slots(fresh)
        return fresh

    async def connections(self) -> list[ConnectionInfo]:
        """The live flows, once for each end that is a pod of ours."""
        live, sampled = await trio.to_thread.run_sync(self._look, 0)
        now_ns, now = time.monotonic_ns(), time.time()
        found = []
        for flow, state in live:
            if not state.open or not state.carried:
                continue
            age_s = (now_ns - state.opened_ns) / 1e9
            sent, received = directions(state, sampled[state.socket_cookie])
            source, destination = map(self.carrier.pod, (state.source, state.destination))
            for direction, pod, peer in (
                ("outbound", source, destination),
                ("inbound", destination, source),
            ):
                if pod is None:
                    continue
                found.append(
                    ConnectionInfo(
                        id=state.socket_cookie,
                        direction=direction,  # type: ignore[arg-type]
                        protocol="TCP",
                        pod=pod.key,
                        source=str(flow.source),
                        destination=str(flow.destination),
                        upstream="",
                        peer_identity=self._identity(peer),
                        service=self.traffic.service(state.slot),
                        opened_at=datetime.fromtimestamp(now - age_s, UTC),
                        age_s=round(age_s, 3),
                        bytes_sent=sent,
                        bytes_received=received,
                        path="kernel",
                    )
                )
        return found

    def _identity(self, pod: LocalPod | None) -> str:
        workload = None if pod is None else pod.workload(self._mesh())
        return "" if workload is None else str(workload.identity)
