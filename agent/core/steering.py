"""Which destinations' connections must enter the agent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from meshbpf.agent.core.address import PackedPrefix, packed_host, packed_network
from meshbpf.agent.core.service import Service
from meshbpf.agent.core.state import MeshDelta
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import NetworkMode, TunnelProtocol, Workload


def mesh_prefixes(mesh: Snapshot, network: str | None = None) -> frozenset[PackedPrefix]:
    """The destinations that the kernel must hand to the agent; all else is outside the mesh.

    Virtual addresses and ranges of all services, and the addresses of
    workloads that speak HBONE or stand behind a waypoint. Without `network`
    it is those of every network: too much is safe, since the agent passes on
    what it does not know; too little would send plaintext.
    """
    return frozenset(_prefixes(mesh.services, mesh.workloads, network))


@dataclass(frozen=True, slots=True)
class PrefixChange:
    """What a delta does to the destinations; nothing of it is in force yet."""

    added: Collection[PackedPrefix]
    removed: Collection[PackedPrefix]
    claims: Counter[PackedPrefix]
    """By how many the records behind each prefix grow (or shrink)."""

    @property
    def empty(self) -> bool:
        """There is nothing to tell the kernel."""
        return not self.added and not self.removed


class MeshPrefixes:
    """The destinations of the mesh, kept up to date delta by delta.

    Counts the records behind each, since two may share one (a VIP in two
    namespaces, a pod that replaces another) and the last one takes it along.
    """

    def __init__(self) -> None:
        self._claims: dict[PackedPrefix, int] = {}

    def __len__(self) -> int:
        return len(self._claims)

    def __iter__(self) -> Iterator[PackedPrefix]:
        return iter(self._claims)

    def change(self, old: Snapshot, new: Snapshot, delta: MeshDelta) -> PrefixChange:
        """What the step from `old` to `new` by `delta` means here."""
        uids = {one.uid for one in delta.workloads}.union(delta.removed_workloads)
        keys = {one.key for one in delta.services}.union(delta.removed_services)
        claims: Counter[PackedPrefix] = Counter()
        for mesh, step in ((old, -1), (new, 1)):
            services = (mesh.service(key.namespace, key.hostname) for key in keys)
            workloads = map(mesh.workload, uids)
            present = _prefixes(filter(None, services), filter(None, workloads), None)
            for prefix in present:
                claims[prefix] += step
        added, removed = [], []
        for prefix, step in claims.items():
            before = self._claims.get(prefix, 0)
            if before == 0 and step > 0:
                added.append(prefix)
            elif before > 0 and before + step == 0:
                removed.append(prefix)
        return PrefixChange(added, removed, claims)

    def commit(self, change: PrefixChange) -> None:
        """The change is in force."""
        for prefix, step in change.claims.items():
            count = self._claims.get(prefix, 0) + step
            if count:
                self._claims[prefix] = count
            else:
                self._claims.pop(prefix, None)


def _prefixes(
    services: Iterable[Service], workloads: Iterable[Workload], network: str | None
) -> Iterator[PackedPrefix]:
    for service in services:
        for address in service.addresses:
            if network is None or address.network == network:
                yield packed_host(address.ip)
        for cidr in service.cidr_addresses:
            if network is None or cidr.network == network:
                yield packed_network(cidr.cidr)
    for workload in workloads:
        if workload.network_mode is NetworkMode.HOST_NETWORK:
            continue  # its address is its node's, and never found by address
        if network is not None and workload.network != network:
            continue
        if workload.tunnel_protocol is TunnelProtocol.HBONE or workload.waypoint is not None:
            yield from map(packed_host, workload.addresses)
