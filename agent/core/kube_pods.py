"""Pods as workloads, as istiod's `podWorkloadBuilder` makes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from meshbpf.agent.core.address import IPAddress
from meshbpf.agent.core.kube_cluster import Cluster
from meshbpf.agent.core.kube_enrolment import tunnel
from meshbpf.agent.core.kube_names import (
    CANONICAL_NAMES,
    CANONICAL_REVISIONS,
    WORKLOAD_NAME,
    first_label,
)
from meshbpf.agent.core.kube_places import Place
from meshbpf.agent.core.kube_services import target_ports
from meshbpf.agent.core.object_fields import Value
from meshbpf.agent.core.objects import KubeObject
from meshbpf.agent.core.workload import (
    DEFAULT_SERVICE_ACCOUNT,
    HealthStatus,
    NetworkMode,
    Workload,
)

_CRON_JOB = re.compile(r"(.+)-\d{8,10}")
TERMINAL = ("Failed", "Succeeded")


def pod_workload(pod: KubeObject, cluster: Cluster, place: Callable[[], Place]) -> Workload | None:
    """The workload that a pod is; None for one that has ended, or has no address yet.

    ObjectError for a pod that cannot be understood; `place` is asked only
    when there is a workload.
    """
    spec, status = Value.spec(pod), Value.of(pod, "status")
    if status.get("phase").raw in TERMINAL:
        return None
    addresses = pod_addresses(pod)
    if not addresses:
        return None
    at = place()
    account = spec.get("serviceAccountName")
    node = spec.get("nodeName")
    name = _workload_name(pod)
    protocol, native = tunnel(pod, enrolled=cluster.by_hand and at.enrolled)
    return Workload(
        uid=f"{cluster.cluster_id}//Pod/{pod.namespace}/{pod.name}",
        name=pod.name,
        namespace=pod.namespace,
        addresses=addresses,
        network=cluster.network,
        tunnel_protocol=protocol,
        trust_domain=cluster.trust_domain,
        service_account=account.text() if account.present else DEFAULT_SERVICE_ACCOUNT,
        waypoint=at.waypoint,
        node=node.text() if node.present else "",
        canonical_name=first_label(pod.labels, CANONICAL_NAMES, name),
        canonical_revision=first_label(pod.labels, CANONICAL_REVISIONS, "latest"),
        workload_type="pod",  # istiod says so of each, for older node proxies
        workload_name=name,
        native_tunnel=native,
        authorization_policies=at.policies,
        status=_health(pod, status, cluster),
        cluster_id=cluster.cluster_id,
        services=target_ports(
            at.services, lambda name: _container_port(pod, name), by_port_name=False
        ),
        application_tunnel=at.tunnel,
        locality=at.locality,
        network_mode=NetworkMode.HOST_NETWORK
        if spec.get("hostNetwork").raw
        else NetworkMode.STANDARD,
    )


def pod_addresses(pod: KubeObject) -> tuple[IPAddress, ...]:
    """The addresses in a pod's status: none until its network was set up."""
    status = Value.of(pod, "status")
    listed = status.get("podIPs")
    found = tuple(item.get("ip").ip() for item in listed.items()) if listed.present else ()
    one = status.get("podIP")
    if not found and one.raw:
        found = (one.ip(),)
    return found


def _health(pod: KubeObject, status: Value, cluster: Cluster) -> HealthStatus:
    if "deletionTimestamp" in pod.metadata:
        return HealthStatus.UNHEALTHY
    conditions = status.get("conditions")
    if not conditions.present and cluster.by_hand:
        return HealthStatus.HEALTHY
    for item in conditions.items() if conditions.present else ():
        if item.get("type").raw == "Ready":
            ready = item.get("status").raw == "True"
            return HealthStatus.HEALTHY if ready else HealthStatus.UNHEALTHY
    return HealthStatus.UNHEALTHY


def _container_port(pod: KubeObject, name: str) -> int | None:
    """The port of that name, of a container or of a sidecar that starts as an init container."""
    spec = Value.spec(pod)
    for container in (*_items(spec.get("containers")), *_items(spec.get("initContainers"))):
        initial = container.path.startswith("spec.initContainers")
        if initial and container.get("restartPolicy").raw != "Always":
            continue
        for port in _items(container.get("ports")):
            tcp = (port.get("protocol").raw or "TCP") == "TCP"
            if tcp and port.get("name").raw == name:
                return port.get("containerPort").integer(1, 65535)
    return None


def _workload_name(pod: KubeObject) -> str:
    """What the pod is one of: a Deployment's name rather than its ReplicaSet's."""
    if WORKLOAD_NAME in pod.labels:
        return pod.labels[WORKLOAD_NAME]
    owners = pod.metadata.get("ownerReferences") or ()
    owner = next((each for each in owners if each.get("controller")), None)
    if owner is None or not pod.metadata.get("generateName"):
        return pod.name
    name, kind = str(owner.get("name", pod.name)), owner.get("kind")
    if kind == "ReplicaSet":
        for label in ("pod-template-hash", "rollouts-pod-template-hash"):
            part = pod.labels.get(label)
            if part and name.endswith(part):
                return name.removesuffix(f"-{part}")
    elif kind == "ReplicationController":
        return pod.labels.get("deploymentconfig", name)
    elif kind == "Job" and (found := _CRON_JOB.fullmatch(name)):
        return found[1]
    return name


def _items(value: Value) -> Iterable[Value]:
    return value.items() if value.present else ()
