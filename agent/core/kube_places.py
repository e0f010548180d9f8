"""What the rest of a cluster says of one workload: services, policies, waypoint, locality."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from meshbpf.agent.core.kube_catalogue import Catalogue
from meshbpf.agent.core.kube_cluster import Cluster, Problems
from meshbpf.agent.core.kube_enrolment import enrolment
from meshbpf.agent.core.kube_entries import Entry
from meshbpf.agent.core.kube_hostnames import Hostnames
from meshbpf.agent.core.kube_names import CORE, DATAPLANE_MODE, REGION, SUBZONE, ZONE
from meshbpf.agent.core.kube_peer_auth import PeerAuthentications
from meshbpf.agent.core.kube_selectors import SelectorIndex
from meshbpf.agent.core.kube_services import KubeService
from meshbpf.agent.core.kube_slices import Slices, slice_service
from meshbpf.agent.core.kube_waypoints import Waypoints
from meshbpf.agent.core.objects import KubeObject, ObjectKey, ObjectSet
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
    """All that workloads ask of their cluster, as it is by now."""

    def __init__(
        self, catalogue: Catalogue, hostnames: Hostnames, slices: Slices, cluster: Cluster
    ) -> None:
        self._catalogue = catalogue
        self._hostnames = hostnames
        self._slices = slices
        self._cluster = cluster
        self.waypoints = Waypoints(ObjectSet.EMPTY, cluster, Problems())
        self.policies: SelectorIndex[ObjectKey, str] = SelectorIndex()
        self.peers = PeerAuthentications((), cluster, Problems())

    def of_pod(self, pod: KubeObject, problems: Problems) -> Place:
        """What is said of a Pod."""
        membership = enrolment(pod, self._catalogue.namespace_labels(pod.namespace))
        if membership.left_alone:
            field = f"metadata.labels[{DATAPLANE_MODE}]"
            problems.note(pod, field, membership.left_alone, "left alone")
        account = str(pod.spec.get("serviceAccountName") or DEFAULT_SERVICE_ACCOUNT)
        binding = self.waypoints.of_workload(pod, account, problems)
        node = self._catalogue.get(ObjectKey(CORE, "Node", "", str(pod.spec.get("nodeName"))))
        return Place(
            services=self._services_of(pod),
            policies=self._applied(pod),
            waypoint=None if binding is None else binding.address,
            tunnel=self.waypoints.tunnel_of(pod),
            locality=node_locality(node),
            enrolled=membership.enrolled,
        )

    def of_entry(self, owner: KubeObject, account: str, problems: Problems) -> Place:
        """What is said of a WorkloadEntry with all its labels."""
        binding = self.waypoints.of_workload(owner, account, problems)
        return Place(
            services=self._hostnames.selecting.of(owner.namespace, owner.labels),
            policies=self._applied(owner),
            waypoint=None if binding is None else binding.address,
            tunnel=self.waypoints.tunnel_of(owner),
        )

    def of_host(self, owner: KubeObject, service: KubeService) -> Place:
        """What is said of a ServiceEntry's host that is its own endpoint."""
        return Place((service,), self._applied(owner))

    def of_endpoint(
        self,
        owner: KubeObject,
        endpoint: Entry,
        services: Iterable[KubeService],
        problems: Problems,
        at: str,
    ) -> Place:
        """What is said of a ServiceEntry's endpoint, written at the field `at`.

        Policies select it by its owner's labels, a waypoint by its own.
        """
        labelled = owner.with_labels(endpoint.labels)
        binding = self.waypoints.of_workload(labelled, endpoint.account, problems, at)
        return Place(
            services=services,
            policies=self._applied(owner),
            waypoint=None if binding is None else binding.address,
            tunnel=self.waypoints.tunnel_of(labelled),
        )

    def _services_of(self, pod: KubeObject) -> Iterable[KubeService]:
        """By selector, and those without one by the slices that somebody wrote."""
        selecting = self._hostnames.selecting.of(pod.namespace, pod.labels)
        naming = self._slices.naming(pod.namespace, pod.name)
        if not naming:
            return selecting
        found: dict[NamespacedHostname, KubeService] = {each.key: each for each in selecting}
        for key in naming:
            one = self._catalogue.get(key)
            service = one and slice_service(one, self._cluster, self._hostnames.by_key)
            if service:
                found.setdefault(service.key, service)
        return found.values()

    def _applied(self, owner: KubeObject) -> tuple[str, ...]:
        namespace, labels = owner.namespace, owner.labels
        policies = set(self.policies.of(namespace, labels))
        policies.update(self.policies.of(self._cluster.root_namespace, labels))
        return (*sorted(policies), *self.peers.applied(namespace, labels))


def node_locality(node: KubeObject | None) -> Locality:
    """Where a Node says that its pods run."""
    if node is None:
        return _NOWHERE
    return Locality(*(node.labels.get(each, "") for each in (REGION, ZONE, SUBZONE)))
