"""Endpoints of services among which the kernel draws for itself.

Where nothing but the endpoint of a service is to be decided, the agent leaves
that in the kernel too: those endpoints on this node that it has verdicts for,
with their weights, and how much weight is elsewhere. The connect hook draws. A
near endpoint is then connected to at once; any other draw is the agent's, which
picks among the others, so that each endpoint gets what the balancer would give
it. An endpoint that only Python may reach (denied, of another family, behind an
application tunnel) counts as elsewhere.

Offers hold as long as the service and its endpoints are the same objects of the
mesh state; `changed` looks at each, in the step that puts a new state into
force. What depends on the pods themselves their epochs say.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from meshbpf.agent.core.address import IPAddress, SocketAddress
from meshbpf.agent.core.carry import Draw, draw_of
from meshbpf.agent.core.service import Service
from meshbpf.agent.core.store import Endpoints, Snapshot
from meshbpf.agent.datapath.flowcodecs import Flow, ServiceChoice, ServiceKey, VerdictKey
from meshbpf.agent.runtime.carried_traffic import CarriedTraffic
from meshbpf.agent.runtime.local_pod import LocalPod
from meshbpf.bpf import MAX_CHOICES, MAX_SERVICES

NOBODY: Final[frozenset[str]] = frozenset()
_Place = tuple[str, str] | None
"""Network and namespace of a client; None for one that the mesh does not know."""


class KernelServices(Protocol):
    """The part of FlowMaps that is used here."""

    def epoch(self, pod: int) -> int:
        """The pod's epoch."""

    def offer(self, key: ServiceKey, total: int, choices: Sequence[ServiceChoice]) -> None:
        """Let the connect hook draw."""

    def withdraw(self, keys: Iterable[ServiceKey]) -> None:
        """Let it draw no more."""

    def take_drawn(self, flow: Flow) -> bool:
        """Whether it has drawn for this connection, and left it to the agent."""


@dataclass(frozen=True, slots=True)
class _Known:
    """What was found of one service for one pod, and what that was found from."""

    source: LocalPod
    source_ip: IPAddress
    service: Service | None
    endpoints: Endpoints | None
    pods: int
    """The generation of the node's pods."""
    epochs: tuple[tuple[int, int], ...]
    """Of all pods that had a say: index and epoch."""
    spared: frozenset[str]
    """Uids of the endpoints that the kernel draws."""
    slots: frozenset[int]


class ServiceChoices:
    """Of one agent; a part of its Carrier."""

    def __init__(
        self,
        kernel: KernelServices,
        allow: Callable[[VerdictKey, Snapshot], bool],
        traffic: CarriedTraffic,
    ) -> None:
        self._kernel = kernel
        self._allow = allow
        self._traffic = traffic
        self._known: OrderedDict[ServiceKey, _Known] = OrderedDict()
        self._stale: dict[ServiceKey, _Known] = {}
        self._near: Mapping[IPAddress, LocalPod] = {}
        self._generation = 0

    def __len__(self) -> int:
        """Services, each counted once for each pod that dials it, that the kernel draws for."""
        return sum(bool(known.spared) for known in self._known.values())

    def pods_changed(self, near: Mapping[IPAddress, LocalPod]) -> None:
        """These are the pods of the node from now on."""
        self._near = near
        self._generation += 1

    def remove(self, pod: int) -> None:
        """The pod is not attached any more."""
        self._withdraw([key for key in self._known if key.pod == pod])
        for key in [key for key in self._stale if key.pod == pod]:
            del self._stale[key]

    def forget_slots(self, slots: Collection[int]) -> None:
        """Take back what counts there."""
        found = [key for key, known in self._known.items() if not known.slots.isdisjoint(slots)]
        self._withdraw(found)

    def spared(
        self, source: LocalPod, client: SocketAddress, target: SocketAddress
    ) -> frozenset[str]:
        """Endpoints that the kernel has drawn for, and not for this connection: take another."""
        known = self._known.get(ServiceKey(source.index, target.ip, target.port))
        if known is None or not known.spared:
            return NOBODY
        return known.spared if self._kernel.take_drawn(Flow(client, target)) else NOBODY

    def offer(
        self, source: LocalPod, source_ip: IPAddress, target: SocketAddress, mesh: Snapshot
    ) -> None:
        """A pod has dialed a service by way of the agent: may the kernel draw the next time?"""
        key = ServiceKey(source.index, target.ip, target.port)
        known = self._known.get(key)
        if known is not None and self._stands(known):
            return
        self._offer(key, source, source_ip, mesh)

    def _stands(self, known: _Known) -> bool:
        epoch = self._kernel.epoch
        return known.pods == self._generation and all(
            epoch(index) == seen for index, seen in known.epochs
        )

    def _offer(
        self, key: ServiceKey, source: LocalPod, source_ip: IPAddress, mesh: Snapshot
    ) -> None:
        draw = self._draw(source, SocketAddress(key.ip, key.port), mesh)
        offered = [] if draw is None else self._choices(source, source_ip, draw, mesh)
        had = self._known.pop(key, None)
        near = () if draw is None else draw.near
        asked = {source.index, *(self._near[each.target.ip].index for each in near)}
        self._known[key] = _Known(
            source,
            source_ip,
            *_found(mesh, _place(source, mesh), key.ip),
            self._generation,
            tuple((index, self._kernel.epoch(index)) for index in asked),
            frozenset(uid for uid, _ in offered),
            frozenset(choice.slot for _, choice in offered),
        )
        if draw is not None and offered:
            self._kernel.offer(key, draw.total, [choice for _, choice in offered])
        elif had is not None and had.spared:
            self._kernel.withdraw((key,))
        if len(self._known) > MAX_SERVICES:
            self._withdraw([next(iter(self._known))])

    def _draw(self, source: LocalPod, target: SocketAddress, mesh: Snapshot) -> Draw | None:
        workload = source.workload(mesh)
        if workload is None or not source.carried:
            return None
        return draw_of(mesh, workload, target, self._near)

    def _choices(
        self, source: LocalPod, source_ip: IPAddress, draw: Draw, mesh: Snapshot
    ) -> list[tuple[str, ServiceChoice]]:
        """The endpoints for which there is a verdict, by uid."""
        found: list[tuple[str, ServiceChoice]] = []
        for each in draw.near:
            target, destination = each.target, self._near[each.target.ip]
            if destination is source or source_ip.version != target.ip.version:
                continue
            verdict = VerdictKey(source.index, destination.index, source_ip, target.ip, target.port)
            if len(found) == MAX_CHOICES or not self._allow(verdict, mesh):
                continue
            slot = self._traffic.slot(
                mesh, source.workload(mesh), source_ip, each.workload, target.port, draw.service
            )
            if slot is not None:
                found.append((each.workload.uid, ServiceChoice(target, each.weight, slot)))
        return found

    # --- changes ------------------------------------------------------------------

    def changed(self, mesh: Snapshot) -> None:
        """`mesh` is in force from this step on: no draw from what it says otherwise."""
        places: dict[int, _Place] = {}
        seen: dict[tuple[_Place, IPAddress], tuple[Service | None, Endpoints | None]] = {}
        stale = []
        for key, known in self._known.items():
            if key.pod not in places:
                places[key.pod] = _place(known.source, mesh)
            at = (places[key.pod], key.ip)
            if at not in seen:
                seen[at] = _found(mesh, *at)
            service, endpoints = seen[at]
            if service is not known.service or endpoints is not known.endpoints:
                stale.append(key)
        self._stale.update((key, self._known[key]) for key in stale if self._known[key].spared)
        self._withdraw(stale)

    def take_stale(self) -> list[ServiceKey]:
        """What was withdrawn for a change since the last time, for `renew`."""
        return list(self._stale)

    def renew(self, key: ServiceKey, mesh: Snapshot) -> None:
        """Offer again what a change has withdrawn, as the mesh is now."""
        known = self._stale.pop(key, None)
        if known is not None and key not in self._known:
            self._offer(key, known.source, known.source_ip, mesh)

    def _withdraw(self, keys: Collection[ServiceKey]) -> None:
        gone = [key for key in keys if self._known.pop(key).spared]
        self._kernel.withdraw(gone)


def _place(pod: LocalPod, mesh: Snapshot) -> _Place:
    workload = pod.workload(mesh)
    return None if workload is None else (workload.network, workload.namespace)


def _found(mesh: Snapshot, place: _Place, ip: IPAddress) -> tuple[Service | None, Endpoints | None]:
    """The service that is dialed there by this address, as `draw_of` finds it."""
    if place is None:
        return None, None
    network, namespace = place
    service = mesh.service_at(network, ip, namespace)
    if service is None or mesh.workload_at(network, ip) is not None:
        return None, None
    return service, mesh.endpoints(service)
