"""The mesh at one moment, indexed: every lookup of the connection path is a dict hit.

A snapshot never changes. A delta makes the next one in time proportional to
the delta (`store_delta.py`), sharing with the old one all that stays; a
connection that holds an old one finishes with it.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from typing import Any, ClassVar

from meshbpf.agent.core import persistent
from meshbpf.agent.core.address import IPAddress, address_bits
from meshbpf.agent.core.authz import PolicyGroup, PolicySet
from meshbpf.agent.core.persistent import PersistentMap
from meshbpf.agent.core.policy import Authorization, PolicyAction, PolicyScope
from meshbpf.agent.core.service import Endpoint, HealthPolicy, Service
from meshbpf.agent.core.state import MeshDelta, MeshState
from meshbpf.agent.core.workload import HealthStatus, TunnelProtocol, Workload

ServiceKey = tuple[str, str]
"""(namespace, hostname)."""
PlaceKey = tuple[str, int]
"""(network, address_bits of an address)."""
Ranges = tuple[tuple[int, PersistentMap[PlaceKey, tuple[Service, ...]]], ...]
"""One table per prefix length, longest first, as (shift, table)."""


class Endpoints(tuple[Endpoint, ...]):
    """The endpoints of one service, and what others derive from them.

    Both live until the service or one of its endpoints changes, so a push
    about something else does not cost the balancer its work.
    """

    memo: dict[Hashable, Any]


_PREPARED_SETS = 256
"""More distinct sets than the pods of a node have; the rest is compiled when asked for."""


class Snapshot:
    """Lookups over one state of the mesh; made by `of` and `after`, never by its constructor."""

    EMPTY: ClassVar[Snapshot]

    __slots__ = (
        "_addresses",
        "_endpoints",
        "_global_policies",
        "_groups",
        "_hostnames",
        "_listed",
        "_members",
        "_names",
        "_namespace_policies",
        "_policies",
        "_policy_sets",
        "_ranges",
        "_services",
        "_services_by_hostname",
        "_vips",
        "_workloads",
        "require_waypoint",
        "version",
    )

    def __init__(self) -> None:
        self.version = 0
        self.require_waypoint = False
        """A setting, not state: see admission.py. Each snapshot has it from the one before."""
        self._workloads: PersistentMap[str, Workload] = persistent.EMPTY
        # Those who claim an address, whose it is first.
        self._addresses: PersistentMap[PlaceKey, tuple[Workload, ...]] = persistent.EMPTY
        self._names: PersistentMap[ServiceKey, tuple[Workload, ...]] = persistent.EMPTY
        self._hostnames: PersistentMap[ServiceKey, tuple[Workload, ...]] = persistent.EMPTY
        self._services: PersistentMap[ServiceKey, Service] = persistent.EMPTY
        self._services_by_hostname: PersistentMap[str, tuple[Service, ...]] = persistent.EMPTY
        self._vips: PersistentMap[PlaceKey, tuple[Service, ...]] = persistent.EMPTY
        self._ranges: Ranges = ()
        # Who names a service, by uid, also before the service is there.
        self._members: PersistentMap[ServiceKey, PersistentMap[str, Endpoint]] = persistent.EMPTY
        # The services whose own records list a workload's uid.
        self._listed: PersistentMap[str, tuple[ServiceKey, ...]] = persistent.EMPTY
        self._policies: PersistentMap[str, Authorization] = persistent.EMPTY
        self._namespace_policies: PersistentMap[str, tuple[Authorization, ...]] = persistent.EMPTY
        self._global_policies: tuple[Authorization, ...] = ()
        # Filled by readers as they ask; a delta carries over what it leaves true.
        self._endpoints: dict[ServiceKey, Endpoints] = {}
        self._policy_sets: dict[tuple[str, tuple[str, ...]], PolicySet] = {}
        # Shared with the snapshots before and after: each group says what it is made of.
        self._groups: dict[str, PolicyGroup] = {}

    @classmethod
    def of(cls, state: MeshState, version: int = 0) -> Snapshot:
        """Index `state`; `version` is the caller's count of states."""
        return cls.EMPTY.after(MeshDelta.whole(state), version)

    @classmethod
    def empty(cls, *, require_waypoint: bool = False) -> Snapshot:
        """The one that all others come after."""
        found = cls()
        found.require_waypoint = require_waypoint
        return found

    def after(self, delta: MeshDelta, version: int) -> Snapshot:
        """The snapshot that `delta` leads to."""
        # Here, for that module needs this one: lookups and writing are two ideas.
        from meshbpf.agent.core.store_delta import advance

        return advance(self, delta, version)

    # -- everything

    @property
    def workloads(self) -> Collection[Workload]:
        """All workloads, in no order that means anything."""
        return self._workloads.values()

    @property
    def services(self) -> Collection[Service]:
        """All services, in no order that means anything."""
        return self._services.values()

    @property
    def policies(self) -> Collection[Authorization]:
        """All policies, in no order that means anything."""
        return self._policies.values()

    # -- workloads

    def workload(self, uid: str) -> Workload | None:
        """By its key."""
        return self._workloads.get(uid)

    def workload_named(self, namespace: str, name: str) -> tuple[Workload, ...]:
        """All workloads of that name: usually one, more when clusters share the state."""
        return self._names.get((namespace, name), ())

    def workload_at(self, network: str, ip: IPAddress) -> Workload | None:
        """By address; where several claim it, a Pod wins, then one that speaks HBONE."""
        found = self._addresses.get((network, address_bits(ip)))
        return found[0] if found else None

    def workload_with_hostname(self, namespace: str, hostname: str) -> Workload | None:
        """By the workload's own hostname (not a service's)."""
        found = self._hostnames.get((namespace, hostname))
        return found[0] if found else None

    # -- services

    def service(self, namespace: str, hostname: str) -> Service | None:
        """By its key."""
        return self._services.get((namespace, hostname))

    def service_at(
        self, network: str, ip: IPAddress, client_namespace: str | None
    ) -> Service | None:
        """By virtual address, as a client of that namespace sees it.

        Services that it may not see do not exist for it. Of several, its own
        namespace's wins, then a canonical one, then the first. Ranges come
        after exact addresses: own namespace, then longest prefix, then
        canonical. None as the namespace sees everything and prefers nothing.
        """
        bits = address_bits(ip)
        found = self._vips.get((network, bits))
        if found is not None:
            best = _best(found, client_namespace)
            if best is not None:
                return best
        return self._service_by_range(network, bits, client_namespace) if self._ranges else None

    def service_with_hostname(self, hostname: str, client_namespace: str | None) -> Service | None:
        """By hostname alone, ranked as `service_at` ranks."""
        return _best(self._services_by_hostname.get(hostname, ()), client_namespace)

    def policy(self, key: str) -> Authorization | None:
        """By NAMESPACE/NAME."""
        return self._policies.get(key)

    def endpoints(self, service: Service) -> Endpoints:
        """The endpoints that the service's health policy lets be taken.

        Collected when first asked, and again after a change of one of them.
        """
        key = (service.namespace, service.hostname)
        found = self._endpoints.get(key)
        if found is None:
            found = self._endpoints[key] = self._collect_endpoints(key)
        return found

    # -- policies

    def policies_for(self, workload: Workload) -> PolicySet:
        """What applies to it: its namespace's, the global ones, its own list.

        A name in its list that no policy has is a policy that has not arrived.
        It could be a DENY, so until it is here nothing is let in.
        """
        return self._policies_of(workload.namespace, workload.authorization_policies)

    def prepare_policies(self, before: Snapshot) -> None:
        """Compile the policies that readers of the state before this one have asked for.

        For whoever makes this snapshot, in their own time: the first
        connection after a change need not wait for it.
        """
        for key in list(before._policy_sets)[:_PREPARED_SETS]:
            self._policies_of(*key).compile()

    def _policies_of(self, namespace: str, listed: tuple[str, ...]) -> PolicySet:
        key = (namespace, listed)
        found = self._policy_sets.get(key)
        if found is None:
            found = self._policy_sets[key] = self._collect_policies(namespace, listed)
        return found

    # -- collecting, once for all who ask

    def _collect_endpoints(self, key: ServiceKey) -> Endpoints:
        found: dict[str, Endpoint] = {}
        service = self._services.get(key)
        if service is not None:
            all_of_them = _allows_unhealthy(service)
            for listed in service.endpoints:
                workload = self._workloads.get(listed.workload_uid)
                healthy = listed.status is HealthStatus.HEALTHY
                if workload is not None and (healthy or all_of_them):
                    found[workload.uid] = Endpoint(workload, listed.ports)
            for member in self._members.get(key, persistent.EMPTY).values():
                if all_of_them or member.workload.status is HealthStatus.HEALTHY:
                    found[member.workload.uid] = member
        endpoints = Endpoints(found.values())
        endpoints.memo = {}
        return endpoints

    def _collect_policies(self, namespace: str, listed: tuple[str, ...]) -> PolicySet:
        own = (self._policies.get(key) or _missing_policy(key) for key in listed)
        return PolicySet.of_groups(
            (
                self._group(namespace, self._namespace_policies.get(namespace, ())),
                self._group("", self._global_policies),
                PolicyGroup.of(tuple(own)),
            )
        )

    def _group(self, namespace: str, policies: tuple[Authorization, ...]) -> PolicyGroup:
        """A namespace's policies (the global ones' is ""), compiled from what was known of it."""
        known = self._groups.get(namespace)
        if known is not None and known.source is policies:
            return known
        group = self._groups[namespace] = PolicyGroup.of(policies, known)
        return group

    def _service_by_range(
        self, network: str, bits: int, client_namespace: str | None
    ) -> Service | None:
        longest: Service | None = None
        for shift, table in self._ranges:
            found = table.get((network, bits >> shift))
            if found is None:
                continue
            best = _best(found, client_namespace)
            if best is None:
                continue
            if best.namespace == client_namespace:
                return best
            longest = longest or best
        return longest


def address_rank(workload: Workload) -> int:
    """Whose an address is when several workloads claim it: the highest rank's.

    A Pod's address is its own; other records (a WorkloadEntry) can be written
    by whoever may write them. Then a member of the mesh is likelier right.
    """
    is_pod = "//Pod/" in workload.uid
    return 2 * is_pod + (workload.tunnel_protocol is TunnelProtocol.HBONE)


def _best(services: tuple[Service, ...], client_namespace: str | None) -> Service | None:
    best: Service | None = None
    rank = (False, False)
    for service in services:
        if client_namespace is not None and not service.visible_to(client_namespace):
            continue
        its = (service.namespace == client_namespace, service.canonical)
        if best is None or its > rank:
            best, rank = service, its
    return best


def _allows_unhealthy(service: Service) -> bool:
    balancing = service.load_balancing
    return balancing is not None and balancing.health_policy is HealthPolicy.ALLOW_ALL


def _missing_policy(key: str) -> Authorization:
    namespace, _, name = key.partition("/")
    return Authorization(
        name=name,
        namespace=namespace,
        scope=PolicyScope.WORKLOAD_SELECTOR,
        action=PolicyAction.DENY,
        inexpressible="the workload names it and it is not in the mesh state",
    )


Snapshot.EMPTY = Snapshot()
