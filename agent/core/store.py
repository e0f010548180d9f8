"""The mesh at one moment, indexed: every lookup of the connection path is a dict hit.

Building is linear in the state. A snapshot never changes; a new state makes a
new one, and a connection that holds an old one finishes with it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from typing import Any, ClassVar, TypeVar

from meshbpf.agent.core.address import IPAddress, address_bits, prefix_bits
from meshbpf.agent.core.authz import PolicySet
from meshbpf.agent.core.policy import Authorization, PolicyAction, PolicyScope
from meshbpf.agent.core.service import Endpoint, HealthPolicy, Service, ServiceEndpoint
from meshbpf.agent.core.state import MeshState
from meshbpf.agent.core.workload import (
    HealthStatus,
    NamespacedHostname,
    NetworkMode,
    TunnelProtocol,
    Workload,
)

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Snapshot:
    """Lookups over one MeshState; made by `of`, never by its constructor."""

    EMPTY: ClassVar[Snapshot]

    __slots__ = (
        "_by_address",
        "_by_hostname",
        "_by_name",
        "_by_uid",
        "_cidrs",
        "_endpoints",
        "_global_policies",
        "_namespace_policies",
        "_policies",
        "_policy_sets",
        "_services",
        "_services_by_hostname",
        "_vips",
        "memo",
        "policies",
        "services",
        "version",
        "workloads",
    )

    def __init__(self, state: MeshState, version: int) -> None:
        self.version = version
        self.workloads = state.workloads
        self.services = state.services
        self.policies = state.policies
        # What others derive from this snapshot and wish to keep as long as it
        # lives (the balancer's candidates); they bound what they put here.
        self.memo: dict[Hashable, Any] = {}
        self._index_workloads(state.workloads)
        self._index_services(state.services)
        self._index_policies(state.policies)

    @classmethod
    def of(cls, state: MeshState, version: int = 0) -> Snapshot:
        """Index `state`; `version` is the caller's count of states."""
        return cls(state, version)

    # -- workloads

    def workload(self, uid: str) -> Workload | None:
        """By its key."""
        return self._by_uid.get(uid)

    def workload_named(self, namespace: str, name: str) -> tuple[Workload, ...]:
        """All workloads of that name: usually one, more when clusters share the state."""
        return self._by_name.get((namespace, name), ())

    def workload_at(self, network: str, ip: IPAddress) -> Workload | None:
        """By address; where several claim it, a Pod wins, then one that speaks HBONE."""
        return self._by_address.get((network, address_bits(ip)))

    def workload_with_hostname(self, namespace: str, hostname: str) -> Workload | None:
        """By the workload's own hostname (not a service's)."""
        return self._by_hostname.get((namespace, hostname))

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
        return self._service_by_range(network, bits, client_namespace) if self._cidrs else None

    def service_with_hostname(self, hostname: str, client_namespace: str | None) -> Service | None:
        """By hostname alone, ranked as `service_at` ranks."""
        return _best(self._services_by_hostname.get(hostname, ()), client_namespace)

    def endpoints(self, service: Service) -> tuple[Endpoint, ...]:
        """The endpoints that the service's health policy lets be taken."""
        return self._endpoints.get((service.namespace, service.hostname), ())

    # -- policies

    def policies_for(self, workload: Workload) -> PolicySet:
        """What applies to it: its namespace's, the global ones, its own list.

        A name in its list that no policy has is a policy that has not arrived.
        It could be a DENY, so until it is here nothing is let in.
        """
        key = (workload.namespace, workload.authorization_policies)
        found = self._policy_sets.get(key)
        if found is None:
            found = self._policy_sets[key] = self._collect_policies(workload)
        return found

    # -- building

    def _index_workloads(self, workloads: Iterable[Workload]) -> None:
        self._by_uid: dict[str, Workload] = {}
        self._by_address: dict[tuple[str, int], Workload] = {}
        self._by_hostname: dict[tuple[str, str], Workload] = {}
        by_name: dict[tuple[str, str], list[Workload]] = defaultdict(list)
        for workload in workloads:
            self._by_uid[workload.uid] = workload
            by_name[workload.namespace, workload.name].append(workload)
            if workload.hostname:
                self._by_hostname.setdefault((workload.namespace, workload.hostname), workload)
            if workload.network_mode is NetworkMode.HOST_NETWORK:
                continue
            for ip in workload.addresses:
                key = (workload.network, address_bits(ip))
                other = self._by_address.get(key)
                if other is None or address_rank(workload) > address_rank(other):
                    self._by_address[key] = workload
        self._by_name = _frozen(by_name)

    def _index_services(self, services: Iterable[Service]) -> None:
        self._services: dict[tuple[str, str], Service] = {}
        vips: dict[tuple[str, int], list[Service]] = defaultdict(list)
        hostnames: dict[str, list[Service]] = defaultdict(list)
        ranges: dict[int, dict[tuple[str, int], list[Service]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for service in services:
            self._services[service.namespace, service.hostname] = service
            hostnames[service.hostname].append(service)
            for address in service.addresses:
                vips[address.network, address_bits(address.ip)].append(service)
            for cidr in service.cidr_addresses:
                shift, value = prefix_bits(cidr.cidr)
                ranges[shift][cidr.network, value].append(service)
        self._vips = _frozen(vips)
        self._services_by_hostname = _frozen(hostnames)
        # One table per prefix length, longest first. The shifts of both
        # families mix: bit 128 keeps their values apart.
        self._cidrs = tuple((shift, _frozen(ranges[shift])) for shift in sorted(ranges))
        self._index_endpoints()

    def _index_endpoints(self) -> None:
        found: dict[tuple[str, str], dict[str, Endpoint]] = defaultdict(dict)

        def add(key: NamespacedHostname, endpoint: ServiceEndpoint) -> None:
            service = self._services.get((key.namespace, key.hostname))
            workload = self._by_uid.get(endpoint.workload_uid)
            if service is None or workload is None:
                return  # named before it arrived; the state that brings it is indexed anew
            if endpoint.status is HealthStatus.HEALTHY or _allows_unhealthy(service):
                found[service.namespace, service.hostname][workload.uid] = Endpoint(
                    workload, endpoint.ports
                )

        for service in self.services:
            for endpoint in service.endpoints:
                add(service.key, endpoint)
        for workload in self.workloads:
            for key, ports in workload.services.items():
                add(key, ServiceEndpoint(workload.uid, ports, workload.status))
        self._endpoints = {key: tuple(of.values()) for key, of in found.items()}

    def _index_policies(self, policies: Iterable[Authorization]) -> None:
        self._policies = {policy.key: policy for policy in policies}
        self._global_policies: list[Authorization] = []
        self._namespace_policies: dict[str, list[Authorization]] = defaultdict(list)
        self._policy_sets: dict[tuple[str, tuple[str, ...]], PolicySet] = {}
        for policy in self._policies.values():
            match policy.scope:
                case PolicyScope.GLOBAL:
                    self._global_policies.append(policy)
                case PolicyScope.NAMESPACE:
                    self._namespace_policies[policy.namespace].append(policy)
                case PolicyScope.WORKLOAD_SELECTOR:
                    continue  # found by name, through the workloads that list it

    def _collect_policies(self, workload: Workload) -> PolicySet:
        chosen = {p.key: p for p in self._namespace_policies.get(workload.namespace, ())}
        chosen.update((p.key, p) for p in self._global_policies)
        for key in workload.authorization_policies:
            chosen[key] = self._policies.get(key) or _missing_policy(key)
        return PolicySet(chosen.values())

    def _service_by_range(
        self, network: str, bits: int, client_namespace: str | None
    ) -> Service | None:
        longest: Service | None = None
        for shift, table in self._cidrs:
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
    for service in services:
        if client_namespace is not None:
            if service.namespace == client_namespace:
                return service
            if not service.visible_to(client_namespace):
                continue
        if best is None or (service.canonical and not best.canonical):
            best = service
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


def _frozen(lists: dict[K, list[V]]) -> dict[K, tuple[V, ...]]:
    return {key: tuple(values) for key, values in lists.items()}


Snapshot.EMPTY = Snapshot.of(MeshState())
