"""A cluster's objects as mesh state: what istiod would send to a node proxy.

Pure: objects in, state and complaints out. One translation serves every source
of objects, a directory of manifests and the API server alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from meshbpf.agent.core.bindings import GATEWAY_API
from meshbpf.agent.core.identity import IdentityError
from meshbpf.agent.core.kube_cluster import Cluster, Problem, Problems
from meshbpf.agent.core.kube_entries import Entry, entry_of
from meshbpf.agent.core.kube_entry_workloads import endpoint_workload, entry_workload
from meshbpf.agent.core.kube_hostnames import settle
from meshbpf.agent.core.kube_names import CORE, DISCOVERY, NETWORKING, SECURITY
from meshbpf.agent.core.kube_peer_auth import PeerAuthentications
from meshbpf.agent.core.kube_places import Places
from meshbpf.agent.core.kube_pods import pod_workload
from meshbpf.agent.core.kube_policies import read_policies
from meshbpf.agent.core.kube_service_entries import ServiceEntry, read_service_entry
from meshbpf.agent.core.kube_services import KubeService, read_services
from meshbpf.agent.core.kube_slices import slice_service, slice_workloads
from meshbpf.agent.core.kube_waypoints import Waypoints
from meshbpf.agent.core.object_fields import ObjectError
from meshbpf.agent.core.objects import KubeObject, ObjectKey, ObjectSet
from meshbpf.agent.core.state import MeshState
from meshbpf.agent.core.workload import NamespacedHostname, Workload

KINDS = (
    (CORE, "v1", "Namespace"),
    (CORE, "v1", "Node"),
    (CORE, "v1", "Pod"),
    (CORE, "v1", "Service"),
    (DISCOVERY, "v1", "EndpointSlice"),
    (GATEWAY_API, "v1", "Gateway"),
    (GATEWAY_API, "v1", "GatewayClass"),
    (NETWORKING, "v1", "ServiceEntry"),
    (NETWORKING, "v1", "WorkloadEntry"),
    (SECURITY, "v1", "AuthorizationPolicy"),
    (SECURITY, "v1", "PeerAuthentication"),
)
"""What the translation reads: (group, version, kind)."""

_NOT_IN_MESH = "it is not in the mesh"
_NO_ENDPOINTS = "its endpoints are not in the mesh"


@dataclass(frozen=True, slots=True)
class Translation:
    """What a cluster's objects came to."""

    state: MeshState
    problems: tuple[Problem, ...]
    broken: frozenset[ObjectKey]
    """Those that could not be read at all."""


def translate(objects: ObjectSet, cluster: Cluster) -> Translation:
    """The mesh state of `objects`. A bad object costs itself alone."""
    problems = Problems()
    waypoints = Waypoints(objects, cluster, problems)
    entries = _service_entries(objects, cluster, waypoints, problems)
    claims = [*read_services(objects, cluster, waypoints, problems)]
    claims += [service for each in entries for service in each.services]
    services = settle(claims, problems)
    policies = read_policies(objects, cluster, problems)
    peers = PeerAuthentications(objects, cluster, problems)
    places = Places(objects, cluster, waypoints, services, policies, peers, problems)
    workloads = _Workloads(objects, cluster, places, services, problems)
    state = MeshState(
        workloads=(
            *workloads.of_pods(),
            *workloads.of_entries(),
            *workloads.of_service_entries(entries),
            *workloads.of_slices(),
        ),
        services=tuple(each.service for each in services.values()),
        policies=(*(one.policy for one in policies), *peers.policies),
    )
    return Translation(state, tuple(problems.found), frozenset(problems.broken))


def _service_entries(
    objects: ObjectSet, cluster: Cluster, waypoints: Waypoints, problems: Problems
) -> list[ServiceEntry]:
    namespaces = {each.name: each for each in objects.of_kind(CORE, "Namespace")}
    found: list[ServiceEntry] = []
    for each in objects.of_kind(NETWORKING, "ServiceEntry"):
        above = namespaces.get(each.namespace)
        try:
            found.append(read_service_entry(each, above, cluster.network, waypoints, problems))
        except ObjectError as error:
            problems.reject(error, each.origin, "its hosts are not in the mesh")
    return found


class _Workloads:
    """Turns what runs in a cluster, and what its entries tell of, into workloads."""

    def __init__(
        self,
        objects: ObjectSet,
        cluster: Cluster,
        places: Places,
        services: Mapping[NamespacedHostname, KubeService],
        problems: Problems,
    ) -> None:
        self._objects = objects
        self._cluster = cluster
        self._places = places
        self._services = services
        self._problems = problems

    def of_pods(self) -> Iterator[Workload]:
        for each in self._objects.of_kind(CORE, "Pod"):
            yield from self._tried(each, self._of_pod, "spec.serviceAccountName")

    def of_entries(self) -> Iterator[Workload]:
        for each in self._objects.of_kind(NETWORKING, "WorkloadEntry"):
            yield from self._tried(each, self._of_entry, "spec.serviceAccount")

    def of_service_entries(self, entries: Iterable[ServiceEntry]) -> Iterator[Workload]:
        for entry in entries:
            held = [service for service in entry.services if self._holds(service)]
            if held:  # else others have its hosts, which is told
                yield from self._of_hosts(entry, held)
                yield from self._of_endpoints(entry, held)

    def of_slices(self) -> Iterator[Workload]:
        for each in self._objects.of_kind(DISCOVERY, "EndpointSlice"):
            yield from self._tried(each, self._of_slice, "metadata.namespace", _NO_ENDPOINTS)

    def _tried(
        self,
        owner: KubeObject,
        made_of: Callable[[KubeObject], Iterable[Workload]],
        identity_at: str,
        consequence: str = _NOT_IN_MESH,
    ) -> tuple[Workload, ...]:
        try:
            return tuple(made_of(owner))
        except ObjectError as error:
            self._problems.reject(error, owner.origin, consequence)
        except IdentityError as error:
            told = ObjectError(owner.key, identity_at, error.what)
            self._problems.reject(told, owner.origin, consequence)
        return ()

    def _of_pod(self, pod: KubeObject) -> Iterator[Workload]:
        found = pod_workload(pod, self._cluster, lambda: self._places.of_pod(pod))
        if found is not None:
            yield found

    def _of_entry(self, owner: KubeObject) -> Iterator[Workload]:
        entry, whole = entry_of(owner)
        place = self._places.of_entry(whole, entry.account)
        yield entry_workload(whole, entry, place, self._cluster)

    def _of_hosts(self, entry: ServiceEntry, held: Iterable[KubeService]) -> Iterator[Workload]:
        for service in held if entry.by_name else ():
            named = Entry.at_host(service.service.hostname)
            place = self._places.of_host(entry.owner, service)
            yield endpoint_workload(entry.owner, named, place, self._cluster)

    def _of_endpoints(self, entry: ServiceEntry, held: list[KubeService]) -> Iterator[Workload]:
        owner = entry.owner
        seen: set[str] = set()
        for index, endpoint in enumerate(entry.endpoints):
            at = f"spec.endpoints[{index}]"
            if endpoint.address in seen:
                what = f"{endpoint.address!r} is an endpoint before this one"
                self._problems.note(owner, f"{at}.address", what, "this endpoint is left out")
                continue
            seen.add(endpoint.address)
            place = self._places.of_endpoint(owner, endpoint, held, at)
            yield endpoint_workload(owner, endpoint, place, self._cluster)

    def _of_slice(self, each: KubeObject) -> Iterator[Workload]:
        service = slice_service(each, self._cluster, self._services)
        if service is not None:
            yield from slice_workloads(each, service, self._cluster)

    def _holds(self, service: KubeService) -> bool:
        found = self._services.get(service.key)
        return found is not None and found.owner is service.owner
