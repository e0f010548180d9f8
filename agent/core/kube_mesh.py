"""A cluster's objects as mesh state: what istiod would send to a node proxy.

Pure: objects in, state and complaints out. One translation serves every source
of objects, a directory of manifests and the API server alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from meshbpf.agent.core.bindings import GATEWAY_API
from meshbpf.agent.core.identity import IdentityError
from meshbpf.agent.core.kube_cluster import Cluster, Problem, Problems
from meshbpf.agent.core.kube_enrolment import enrolment
from meshbpf.agent.core.kube_names import CORE, DISCOVERY, REGION, SECURITY, SUBZONE, ZONE
from meshbpf.agent.core.kube_peer_auth import PeerAuthentications
from meshbpf.agent.core.kube_pods import (
    PodPlace,
    pod_workload,
    slice_pods,
    slice_service,
    slice_workloads,
)
from meshbpf.agent.core.kube_policies import read_policies
from meshbpf.agent.core.kube_selectors import SelectorIndex
from meshbpf.agent.core.kube_services import KubeService, read_services
from meshbpf.agent.core.kube_waypoints import Waypoints
from meshbpf.agent.core.object_fields import ObjectError
from meshbpf.agent.core.objects import KubeObject, ObjectKey, ObjectSet
from meshbpf.agent.core.policy import Authorization, PolicyScope
from meshbpf.agent.core.state import MeshState
from meshbpf.agent.core.workload import (
    DEFAULT_SERVICE_ACCOUNT,
    Locality,
    NamespacedHostname,
    Workload,
)

KINDS = (
    (CORE, "v1", "Namespace"),
    (CORE, "v1", "Node"),
    (CORE, "v1", "Pod"),
    (CORE, "v1", "Service"),
    (DISCOVERY, "v1", "EndpointSlice"),
    (GATEWAY_API, "v1", "Gateway"),
    (GATEWAY_API, "v1", "GatewayClass"),
    (SECURITY, "v1", "AuthorizationPolicy"),
    (SECURITY, "v1", "PeerAuthentication"),
)
"""What the translation reads: (group, version, kind)."""

_NOT_IN_MESH = "it is not in the mesh"


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
    services = read_services(objects, cluster, waypoints, problems)
    policies = read_policies(objects, cluster, problems)
    peers = PeerAuthentications(objects, cluster, problems)
    pods = _Pods(objects, cluster, waypoints, services, peers, problems)
    pods.select_by(
        [
            (one.policy, one.selector)
            for one in policies
            if one.policy.scope is PolicyScope.WORKLOAD_SELECTOR and one.selector is not None
        ]
    )
    workloads = [*pods.workloads(), *_bare_endpoints(objects, cluster, services, problems)]
    state = MeshState(
        workloads=tuple(workloads),
        services=tuple(each.service for each in services.values()),
        policies=(*(one.policy for one in policies), *peers.policies),
    )
    return Translation(state, tuple(problems.found), frozenset(problems.broken))


class _Pods:
    """Turns Pods into workloads, with what the rest of the cluster says of them."""

    def __init__(
        self,
        objects: ObjectSet,
        cluster: Cluster,
        waypoints: Waypoints,
        services: Mapping[NamespacedHostname, KubeService],
        peers: PeerAuthentications,
        problems: Problems,
    ) -> None:
        self._pods = tuple(objects.of_kind(CORE, "Pod"))
        self._cluster = cluster
        self._waypoints = waypoints
        self._peers = peers
        self._problems = problems
        self._labels = {each.name: each.labels for each in objects.of_kind(CORE, "Namespace")}
        self._localities = {
            each.name: Locality(
                each.labels.get(REGION, ""),
                each.labels.get(ZONE, ""),
                each.labels.get(SUBZONE, ""),
            )
            for each in objects.of_kind(CORE, "Node")
        }
        self._selecting = SelectorIndex(
            (each.service.namespace, each.selector, each) for each in services.values()
        )
        self._listed = _services_by_slice(objects, cluster, services)
        self._policies: SelectorIndex[str] = SelectorIndex(())

    def select_by(self, policies: Iterable[tuple[Authorization, Mapping[str, str]]]) -> None:
        """The policies that select pods by their labels."""
        self._policies = SelectorIndex(
            (policy.namespace, selector, policy.key) for policy, selector in policies
        )

    def workloads(self) -> Iterable[Workload]:
        for pod in self._pods:
            try:
                found = pod_workload(pod, self._cluster, lambda pod=pod: self._place(pod))  # type: ignore[misc]
            except ObjectError as error:
                self._problems.reject(error, pod.origin, _NOT_IN_MESH)
            except IdentityError as error:
                told = ObjectError(pod.key, "spec.serviceAccountName", error.what)
                self._problems.reject(told, pod.origin, _NOT_IN_MESH)
            else:
                if found is not None:
                    yield found

    def _place(self, pod: KubeObject) -> PodPlace:
        labels = pod.labels
        namespace_labels = self._labels.get(pod.namespace, {})
        services = {each.key: each for each in self._selecting.of(pod.namespace, labels)}
        for each in self._listed.get((pod.namespace, pod.name), ()):
            services.setdefault(each.key, each)
        policies = set(self._policies.of(pod.namespace, labels))
        policies.update(self._policies.of(self._cluster.root_namespace, labels))
        membership = enrolment(pod, namespace_labels)
        if membership.left_alone:
            self._problems.note(
                pod, "metadata.labels[istio.io/dataplane-mode]", membership.left_alone, "left alone"
            )
        account = str(pod.spec.get("serviceAccountName") or DEFAULT_SERVICE_ACCOUNT)
        binding = self._waypoints.of_pod(pod, account)
        return PodPlace(
            services=services.values(),
            policies=(*sorted(policies), *self._peers.applied(pod.namespace, labels)),
            locality=self._localities.get(str(pod.spec.get("nodeName")), Locality()),
            waypoint=None if binding is None else binding.address,
            tunnel=self._waypoints.tunnel_of(pod),
            enrolled=membership.enrolled,
        )


def _services_by_slice(
    objects: ObjectSet, cluster: Cluster, services: Mapping[NamespacedHostname, KubeService]
) -> dict[tuple[str, str], list[KubeService]]:
    """Pods that a service without a selector has by name, in slices that somebody wrote."""
    found: dict[tuple[str, str], list[KubeService]] = defaultdict(list)
    for each in objects.of_kind(DISCOVERY, "EndpointSlice"):
        key = slice_service(each, cluster)
        service = None if key is None else services.get(key)
        if service is None or service.selector:
            continue  # by selector they are found anyway
        try:
            for pod in slice_pods(each):
                found[pod].append(service)
        except ObjectError:
            continue  # told where its endpoints are read
    return found


def _bare_endpoints(
    objects: ObjectSet,
    cluster: Cluster,
    services: Mapping[NamespacedHostname, KubeService],
    problems: Problems,
) -> Iterable[Workload]:
    for each in objects.of_kind(DISCOVERY, "EndpointSlice"):
        key = slice_service(each, cluster)
        service = None if key is None else services.get(key)
        if service is None:
            continue
        try:
            yield from tuple(slice_workloads(each, service, cluster))
        except ObjectError as error:
            problems.reject(error, each.origin, "its endpoints are not in the mesh")
