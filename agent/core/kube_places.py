"""What the rest of a cluster says of one workload: services, policies, waypoint, locality."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from meshbpf.agent.core.kube_cluster import Cluster, Problems
from meshbpf.agent.core.kube_enrolment import enrolment
from meshbpf.agent.core.kube_entries import Entry
from meshbpf.agent.core.kube_names import CORE, DATAPLANE_MODE, DISCOVERY, REGION, SUBZONE, ZONE
from meshbpf.agent.core.kube_peer_auth import PeerAuthentications
from meshbpf.agent.core.kube_policies import KubePolicy
from meshbpf.agent.core.kube_selectors import SelectorIndex
from meshbpf.agent.core.kube_services import KubeService
from meshbpf.agent.core.kube_slices import slice_pods, slice_service
from meshbpf.agent.core.kube_waypoints import Waypoints
from meshbpf.agent.core.object_fields import ObjectError
from meshbpf.agent.core.objects import KubeObject, ObjectSet
from meshbpf.agent.core.policy import PolicyScope
from meshbpf.agent.core.workload import (
    DEFAULT_SERVICE_ACCOUNT,
    ApplicationTunnel,
    GatewayAddress,
    Locality,
    NamespacedHostname,
)

_NOWHERE = Locality()


@dataclass(frozen=True, slots=True)
class Place:
    """The answer for one workload."""

    services: Iterable[KubeService] = ()
    policies: tuple[str, ...] = ()
    waypoint: GatewayAddress | None = None
    tunnel: ApplicationTunnel | None = None
    locality: Locality = _NOWHERE
    enrolled: bool = False


class Places:
    """All that workloads ask of their cluster."""

    def __init__(
        self,
        objects: ObjectSet,
        cluster: Cluster,
        waypoints: Waypoints,
        services: Mapping[NamespacedHostname, KubeService],
        policies: Iterable[KubePolicy],
        peers: PeerAuthentications,
        problems: Problems,
    ) -> None:
        self._cluster = cluster
        self._waypoints = waypoints
        self._peers = peers
        self._problems = problems
        self._labels = {each.name: each.labels for each in objects.of_kind(CORE, "Namespace")}
        self._localities = {each.name: _locality(each) for each in objects.of_kind(CORE, "Node")}
        self._selecting = SelectorIndex(
            (each.service.namespace, each.selector, each) for each in services.values()
        )
        self._listed = _services_by_slice(objects, cluster, services)
        self._policies = SelectorIndex(
            (one.policy.namespace, one.selector, one.policy.key)
            for one in policies
            if one.policy.scope is PolicyScope.WORKLOAD_SELECTOR and one.selector is not None
        )

    def of_pod(self, pod: KubeObject) -> Place:
        """What is said of a Pod."""
        services = {each.key: each for each in self._selecting.of(pod.namespace, pod.labels)}
        for each in self._listed.get((pod.namespace, pod.name), ()):
            services.setdefault(each.key, each)
        membership = enrolment(pod, self._labels.get(pod.namespace, {}))
        if membership.left_alone:
            field = f"metadata.labels[{DATAPLANE_MODE}]"
            self._problems.note(pod, field, membership.left_alone, "left alone")
        account = str(pod.spec.get("serviceAccountName") or DEFAULT_SERVICE_ACCOUNT)
        binding = self._waypoints.of_workload(pod, account)
        return Place(
            services=services.values(),
            policies=self._applied(pod),
            waypoint=None if binding is None else binding.address,
            tunnel=self._waypoints.tunnel_of(pod),
            locality=self._localities.get(str(pod.spec.get("nodeName")), _NOWHERE),
            enrolled=membership.enrolled,
        )

    def of_entry(self, owner: KubeObject, account: str) -> Place:
        """What is said of a WorkloadEntry with all its labels."""
        binding = self._waypoints.of_workload(owner, account)
        return Place(
            services=self._selecting.of(owner.namespace, owner.labels),
            policies=self._applied(owner),
            waypoint=None if binding is None else binding.address,
            tunnel=self._waypoints.tunnel_of(owner),
        )

    def of_host(self, owner: KubeObject, service: KubeService) -> Place:
        """What is said of a ServiceEntry's host that is its own endpoint."""
        return Place((service,), self._applied(owner))

    def of_endpoint(
        self, owner: KubeObject, endpoint: Entry, services: Iterable[KubeService], at: str
    ) -> Place:
        """What is said of a ServiceEntry's endpoint, written at the field `at`.

        Policies select it by its owner's labels, a waypoint by its own.
        """
        labelled = owner.with_labels(endpoint.labels)
        binding = self._waypoints.of_workload(labelled, endpoint.account, at)
        return Place(
            services=services,
            policies=self._applied(owner),
            waypoint=None if binding is None else binding.address,
            tunnel=self._waypoints.tunnel_of(labelled),
        )

    def _applied(self, owner: KubeObject) -> tuple[str, ...]:
        namespace, labels = owner.namespace, owner.labels
        policies = set(self._policies.of(namespace, labels))
        policies.update(self._policies.of(self._cluster.root_namespace, labels))
        return (*sorted(policies), *self._peers.applied(namespace, labels))


def _locality(node: KubeObject) -> Locality:
    return Locality(*(node.labels.get(each, "") for each in (REGION, ZONE, SUBZONE)))


def _services_by_slice(
    objects: ObjectSet, cluster: Cluster, services: Mapping[NamespacedHostname, KubeService]
) -> dict[tuple[str, str], list[KubeService]]:
    """Pods that a service without a selector has by name, in slices that somebody wrote."""
    found: dict[tuple[str, str], list[KubeService]] = defaultdict(list)
    for each in objects.of_kind(DISCOVERY, "EndpointSlice"):
        service = slice_service(each, cluster, services)
        if service is None or service.selector:
            continue  # by selector they are found anyway
        try:
            for pod in slice_pods(each):
                found[pod].append(service)
        except ObjectError:
            continue  # told where its endpoints are read
    return found
