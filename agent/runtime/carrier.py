"""Flows that the kernel carries: what it may, and what becomes of them when that changes.

The agent decides on connections that reach it, and where the answer is a plain
yes it leaves that answer in the kernel: the next connection like it never
comes here. `offer_pair` and `offer_plaintext` do so; they take a few
microseconds and change nothing about the connection at hand.

Which endpoint of a service a connection gets is decided in the kernel as well, where
that is all there is to decide (service_choices.py).

A new mesh state takes back what it may have changed, in this order:

    changed     in the step of the event loop that puts the state into force:
                the epochs of all pods whose footprint differs are raised, and
                no verdict of before holds
    settle      verdicts that were in use are decided anew, live flows judged
                again, and ended where policy says no; then the state counts
                as applied

What slips through between a SYN and its last ACK the kernel reports, and
`watch` judges it the same way.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final, Protocol

import trio

from meshbpf.agent.core.address import IPAddress, SocketAddress
from meshbpf.agent.core.authz import ConnectionFacts, Decision
from meshbpf.agent.core.carry import between_pods, footprint, plaintext, still_allowed
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import Workload
from meshbpf.agent.datapath.flowcodecs import Flow, FlowReport, FlowState, VerdictKey
from meshbpf.agent.runtime.carried_traffic import CarriedTraffic
from meshbpf.agent.runtime.local_pod import LocalPod
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.runtime.service_choices import KernelServices, ServiceChoices
from meshbpf.bpf import MAX_VERDICTS, Report

REPORT_POLL_S: Final = 0.1
_BATCH: Final = 200
"""Judged between two chances for others to run."""
_MOST_KEPT: Final = MAX_VERDICTS // 2
"""Verdicts that are renewed after a change; the kernel's map drops the oldest on its own."""

log = Log("carrier")


class KernelFlows(KernelServices, Protocol):
    """The part of FlowMaps that is used here."""

    def raise_epochs(self, pods: Iterable[int]) -> None:
        """No verdict about these pods holds any more."""

    def allow(self, key: VerdictKey, slot: int) -> None:
        """Write a verdict under the epochs in force."""

    def forget(self, keys: Iterable[VerdictKey]) -> None:
        """Remove verdicts."""

    def state(self, flow: Flow) -> FlowState | None:
        """One live flow."""

    def live(self) -> Sequence[tuple[Flow, FlowState]]:
        """All live flows."""

    def move_slot(self, flow: Flow, slot: int) -> None:
        """Count a flow elsewhere."""

    def reports(self) -> Sequence[FlowReport]:
        """What was established in doubt."""

    def take_lost_reports(self) -> int:
        """How many reports found no room."""


Destroy = Callable[[Sequence[tuple[Flow, int, int]]], int]
"""Ends flows, each given with its pod and the cookie of its socket there; blocking."""


class Carrier:
    """One per agent; called from the event loop."""

    def __init__(
        self,
        kernel: KernelFlows,
        destroy: Destroy,
        mesh: Callable[[], Snapshot],
        traffic: CarriedTraffic,
    ) -> None:
        self._kernel = kernel
        self._destroy = destroy
        self._mesh = mesh
        self._traffic = traffic
        self._pods: dict[int, LocalPod] = {}
        self._by_ip: dict[IPAddress, LocalPod] = {}
        self._footprints: dict[int, tuple[object, ...]] = {}
        self._verdicts: OrderedDict[VerdictKey, int] = OrderedDict()
        self.services = ServiceChoices(kernel, self._decide, traffic)
        """Where the kernel draws endpoints."""
        self._dirty: set[int] = set()
        self._settling = trio.Lock()
        self._retired = False
        self._cut = 0

    @property
    def cut(self) -> int:
        """Flows that a change of policy has ended."""
        return self._cut

    @property
    def verdicts(self) -> int:
        """Verdicts that are remembered."""
        return len(self._verdicts)

    def retire(self) -> None:
        """A successor writes the kernel's verdicts from now on, and judges its flows."""
        self._retired = True

    # --- pods -------------------------------------------------------------------

    def add(self, pod: LocalPod) -> None:
        """The pod is attached, or is so in another way: it may be an end of flows."""
        self._pods[pod.index] = pod
        self._index()
        self._footprints[pod.index] = self._footprint(pod, self._mesh())

    def remove(self, index: int) -> None:
        """The pod is not attached any more; the kernel side has forgotten it already."""
        self._pods.pop(index, None)
        self._footprints.pop(index, None)
        self._index()
        self.services.remove(index)
        for key in [key for key in self._verdicts if index in (key.source, key.destination)]:
            del self._verdicts[key]

    def _index(self) -> None:
        self._by_ip = {ip: pod for pod in self._pods.values() for ip in pod.addresses}
        near = {ip: pod for ip, pod in self._by_ip.items() if pod.carried}
        self.services.pods_changed(near)

    def pod(self, index: int) -> LocalPod | None:
        """The attached pod of this index."""
        return self._pods.get(index)

    def forget_slots(self, slots: Collection[int]) -> None:
        """Take back the verdicts and the services' choices that count there."""
        self.services.forget_slots(slots)
        keys = [key for key, slot in self._verdicts.items() if slot in slots]
        for key in keys:
            del self._verdicts[key]
        self._kernel.forget(keys)

    # --- connections that the agent has decided on --------------------------------

    def offer_pair(self, source: LocalPod, source_ip: IPAddress, target: SocketAddress) -> None:
        """A pod dials an address: may the kernel carry the next such connection?"""
        destination = self._by_ip.get(target.ip)
        if destination is None or destination is source:
            return
        key = VerdictKey(source.index, destination.index, source_ip, target.ip, target.port)
        self._decide(key, self._mesh())

    def offer_service(self, source: LocalPod, source_ip: IPAddress, target: SocketAddress) -> None:
        """A pod dials a service: may the kernel draw an endpoint of this node the next time?"""
        if not self._retired:
            self.services.offer(source, source_ip, target, self._mesh())

    def offer_plaintext(self, pod: LocalPod, facts: ConnectionFacts) -> None:
        """Policy has let plaintext in: may the kernel let the next one in?"""
        key = VerdictKey(
            0, pod.index, facts.source_ip, facts.destination_ip, facts.destination_port
        )
        self._decide(key, self._mesh())

    def caller(
        self, pod: LocalPod, source: SocketAddress, target: SocketAddress
    ) -> LocalPod | None:
        """Whose connection it is that came to `pod` in plaintext, if the kernel attests it."""
        state = self._kernel.state(Flow(source, target))
        if state is None or not state.attested or state.destination != pod.index:
            return None
        caller = self._pods.get(state.source)
        if caller is None or caller.cookie != state.source_cookie:
            return None
        return caller

    def _decide(self, key: VerdictKey, mesh: Snapshot) -> bool:
        """Put a yes into the kernel; must not let go of the event loop (see FlowMaps)."""
        source, destination = self._ends(key, mesh)
        if self._retired or destination is None or (key.source and source is None):
            return False
        own = self._pods[key.destination].addresses
        target = SocketAddress(key.destination_ip, key.port)
        if source is not None:
            decision = between_pods(mesh, source, key.source_ip, destination, own, target)
        elif key.destination_ip in own:
            facts = ConnectionFacts(None, key.source_ip, key.destination_ip, key.port)
            decision = plaintext(mesh, destination, facts)
        else:
            return False
        if not decision.allowed:
            return False
        slot = self._traffic.slot(mesh, source, key.source_ip, destination, key.port)
        if slot is None:
            return False
        self._kernel.allow(key, slot)
        self._verdicts[key] = slot
        self._verdicts.move_to_end(key)
        if len(self._verdicts) > _MOST_KEPT:
            self._verdicts.popitem(last=False)
        return True

    def _ends(self, key: VerdictKey, mesh: Snapshot) -> tuple[Workload | None, Workload | None]:
        source = self._pods.get(key.source)
        destination = self._pods.get(key.destination)
        return (
            None if source is None else source.workload(mesh),
            None if destination is None else destination.workload(mesh),
        )

    # --- changes ------------------------------------------------------------------

    def changed(self, mesh: Snapshot) -> None:
        """`mesh` is in force from this step of the event loop on."""
        if self._retired:
            return
        dirty = set()
        for index, pod in self._pods.items():
            fresh = self._footprint(pod, mesh)
            if fresh != self._footprints.get(index):
                self._footprints[index] = fresh
                dirty.add(index)
        self._kernel.raise_epochs(dirty)
        self._dirty |= dirty
        self.services.changed(mesh)

    def doubt_all(self) -> None:
        """Judge everything again at the next `settle`: what an earlier agent left, for one."""
        self._kernel.raise_epochs(self._pods)
        self._dirty |= self._pods.keys()

    async def settle(self, *, adopt: bool = False) -> int:
        """Renew verdicts, judge live flows, end what is not allowed; how many ended.

        `adopt`: also count the flows that are there under slots of our own.
        """
        async with self._settling:
            dirty, self._dirty = self._dirty, set()
            await self._renew_services()
            if not dirty:
                return 0
            try:
                await self._renew(dirty)
                ended = await self._judge_live(dirty, adopt)
            except BaseException:
                self._dirty |= dirty  # not settled yet
                raise
        if ended:
            log.info("kernel-carried connections cut by policy", count=ended)
        return ended

    async def _renew(self, dirty: Collection[int]) -> None:
        stale = [key for key in self._verdicts if key.source in dirty or key.destination in dirty]
        for count, key in enumerate(stale, 1):
            if key in self._verdicts and not self._decide(key, self._mesh()):
                del self._verdicts[key]
                self._kernel.forget((key,))
            if count % _BATCH == 0:
                await trio.lowlevel.checkpoint()

    async def _renew_services(self) -> None:
        for count, key in enumerate(self.services.take_stale(), 1):
            if not self._retired:
                self.services.renew(key, self._mesh())
            if count % _BATCH == 0:
                await trio.lowlevel.checkpoint()

    async def _judge_live(self, dirty: Collection[int], adopt: bool) -> int:
        live = await trio.to_thread.run_sync(self._kernel.live)
        ends = []
        for count, (flow, state) in enumerate(live, 1):
            if state.source in dirty or state.destination in dirty:
                if not state.carried:
                    continue  # the agent has it, and judges it
                if not self._may_live(flow, state.source, state.destination, state.source_cookie):
                    ends.append((flow, state.watched_in, state.socket_cookie))
                elif adopt:
                    self._adopt(flow, state)
            if count % _BATCH == 0:
                await trio.lowlevel.checkpoint()
        return await self._end(ends)

    def _may_live(self, flow: Flow, source: int, destination: int, cookie: int | None) -> bool:
        mesh = self._mesh()
        server, client = self._pods.get(destination), self._pods.get(source)
        workload = None if server is None else server.workload(mesh)
        caller = None if client is None else client.workload(mesh)
        if workload is None or (source and caller is None):
            return False
        if cookie and (client is None or client.cookie != cookie):
            return False
        decision: Decision = still_allowed(mesh, caller, flow.source.ip, workload, flow.destination)
        return decision.allowed

    def _adopt(self, flow: Flow, state: FlowState) -> None:
        key = VerdictKey(
            state.source, state.destination,
            flow.source.ip, flow.destination.ip, flow.destination.port,
        )  # fmt: skip
        mesh = self._mesh()
        source, destination = self._ends(key, mesh)
        if destination is None:
            return
        slot = self._traffic.slot(mesh, source, key.source_ip, destination, key.port)
        if slot is not None:
            self._kernel.move_slot(flow, slot)
            if state.open:
                self._traffic.adopted(slot)

    async def _end(self, ends: Sequence[tuple[Flow, int, int]]) -> int:
        if not ends:
            return 0
        ended = await trio.to_thread.run_sync(self._destroy, ends)
        self._cut += ended
        return ended

    def _footprint(self, pod: LocalPod, mesh: Snapshot) -> tuple[object, ...]:
        return footprint(mesh, pod.workload(mesh), pod.addresses)

    # --- what the kernel asks -------------------------------------------------------

    async def watch(self) -> None:
        """Judge what was established in doubt, until cancelled."""
        while True:
            await self.answer_reports()
            await trio.sleep(REPORT_POLL_S)

    async def answer_reports(self) -> int:
        """Judge the flows that the kernel reports; how many were ended."""
        if self._kernel.take_lost_reports():
            log.warning("more connections in doubt than the kernel could tell of: judging all")
            self.doubt_all()
            await self.settle()
        ends = [
            (report.flow, report.watched_in, report.socket_cookie)
            for report in self._kernel.reports()
            if report.reason is Report.UNTRACKED
            or not self._may_live(report.flow, report.source, report.destination, None)
        ]
        return await self._end(ends)
