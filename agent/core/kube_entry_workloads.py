"""WorkloadEntries and a ServiceEntry's endpoints as workloads.

As istiod's `workloadEntryWorkloadBuilder` and `serviceEntryWorkloadBuilder`
(pilot/pkg/serviceregistry/ambient/workloads.go). Nobody says whether such a
machine is well, so all of them count as healthy, as there.
"""

from __future__ import annotations

from meshbpf.agent.core.kube_cluster import Cluster
from meshbpf.agent.core.kube_enrolment import tunnel
from meshbpf.agent.core.kube_entries import Entry
from meshbpf.agent.core.kube_names import (
    AMBIENT,
    AUTO_REGISTRATION,
    CANONICAL_NAMES,
    CANONICAL_REVISIONS,
    DATAPLANE_MODE,
    NETWORKING,
    WORKLOAD_NAME,
    first_label,
)
from meshbpf.agent.core.kube_places import Place
from meshbpf.agent.core.kube_services import target_ports
from meshbpf.agent.core.objects import KubeObject
from meshbpf.agent.core.workload import Workload


def entry_workload(owner: KubeObject, entry: Entry, place: Place, cluster: Cluster) -> Workload:
    """The workload that a WorkloadEntry is; `owner` as `entry_of` gives it."""
    name = owner.annotations.get(AUTO_REGISTRATION) or owner.labels.get(WORKLOAD_NAME, owner.name)
    uid = f"{cluster.cluster_id}/{NETWORKING}/WorkloadEntry/{owner.namespace}/{owner.name}"
    return _workload(owner, entry, place, cluster, uid, name)


def endpoint_workload(owner: KubeObject, entry: Entry, place: Place, cluster: Cluster) -> Workload:
    """The workload that an endpoint of the ServiceEntry `owner` is, by its names and tunnel."""
    base = f"{cluster.cluster_id}/{NETWORKING}/ServiceEntry"
    uid = f"{base}/{owner.namespace}/{owner.name}/{entry.address}"
    return _workload(owner, entry, place, cluster, uid, owner.name)


def _workload(
    owner: KubeObject, entry: Entry, place: Place, cluster: Cluster, uid: str, name: str
) -> Workload:
    # No agent of ours steers it. By hand, its own label may say that somebody else does.
    enrolled = cluster.by_hand and owner.labels.get(DATAPLANE_MODE) == AMBIENT
    protocol, native = tunnel(owner, enrolled=enrolled)
    return Workload(
        uid=uid,
        name=owner.name,
        namespace=owner.namespace,
        addresses=() if entry.ip is None else (entry.ip,),
        hostname=entry.address if entry.ip is None else "",
        network=entry.network or cluster.network,
        tunnel_protocol=protocol,
        native_tunnel=native,
        trust_domain=cluster.trust_domain,
        service_account=entry.account,
        waypoint=place.waypoint,
        canonical_name=first_label(owner.labels, CANONICAL_NAMES, name),
        canonical_revision=first_label(owner.labels, CANONICAL_REVISIONS, "latest"),
        workload_type="pod",  # as istiod has it, for node proxies that know no other
        workload_name=name,
        authorization_policies=place.policies,
        cluster_id=cluster.cluster_id,
        services=target_ports(place.services, entry.ports.get, by_port_name=True),
        application_tunnel=place.tunnel,
        locality=entry.locality,
        capacity=entry.weight or 1,
    )
