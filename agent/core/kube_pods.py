"""Pods as workloads, and endpoints without a pod as bare ones.

As istiod's `podWorkloadBuilder` and `endpointSlicesBuilder`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from meshbpf.agent.core.address import IPAddress
from meshbpf.agent.core.kube_cluster import Cluster
from meshbpf.agent.core.kube_names import (
    CANONICAL_NAMES,
    CANONICAL_REVISIONS,
    REDIRECTION,
    REDIRECTION_ENABLED,
    SERVICE_NAME,
    TUNNEL,
    WORKLOAD_NAME,
)
from meshbpf.agent.core.kube_services import KubeService
from meshbpf.agent.core.object_fields import Value
from meshbpf.agent.core.objects import KubeObject
from meshbpf.agent.core.workload import (
    DEFAULT_SERVICE_ACCOUNT,
    ApplicationTunnel,
    GatewayAddress,
    HealthStatus,
    Locality,
    NamespacedHostname,
    NetworkMode,
    TunnelProtocol,
    Workload,
)

_CRON_JOB = re.compile(r"(.+)-\d{8,10}")
TERMINAL = ("Failed", "Succeeded")


@dataclass(frozen=True, slots=True)
class PodPlace:
    """What the rest of the cluster says of one pod."""

    services: Iterable[KubeService]
    policies: tuple[str, ...]
    locality: Locality
    waypoint: GatewayAddress | None
    tunnel: ApplicationTunnel | None
    enrolled: bool


def pod_workload(
    pod: KubeObject, cluster: Cluster, place: Callable[[], PodPlace]
) -> Workload | None:
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
    tunnel, native = TunnelProtocol.NONE, False
    redirected = pod.annotations.get(REDIRECTION) == REDIRECTION_ENABLED
    if redirected or (cluster.by_hand and at.enrolled):
        tunnel = TunnelProtocol.HBONE
    if "http" in pod.labels.get(TUNNEL, "").split(","):
        tunnel, native = TunnelProtocol.HBONE, True
    return Workload(
        uid=f"{cluster.cluster_id}//Pod/{pod.namespace}/{pod.name}",
        name=pod.name,
        namespace=pod.namespace,
        addresses=addresses,
        network=cluster.network,
        tunnel_protocol=tunnel,
        trust_domain=cluster.trust_domain,
        service_account=account.text() if account.present else DEFAULT_SERVICE_ACCOUNT,
        waypoint=at.waypoint,
        node=node.text() if node.present else "",
        canonical_name=_first(pod.labels, CANONICAL_NAMES, name),
        canonical_revision=_first(pod.labels, CANONICAL_REVISIONS, "latest"),
        workload_type="pod",  # istiod says so of each, for older node proxies
        workload_name=name,
        native_tunnel=native,
        authorization_policies=at.policies,
        status=_health(pod, status, cluster),
        cluster_id=cluster.cluster_id,
        services=_target_ports(pod, at.services),
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


def _target_ports(
    pod: KubeObject, services: Iterable[KubeService]
) -> dict[NamespacedHostname, Mapping[int, int]]:
    found: dict[NamespacedHostname, Mapping[int, int]] = {}
    for each in services:
        ports: dict[int, int] = {}
        for port in each.ports:
            target: int | None = port.target
            if port.target_name:
                target = _container_port(pod, port.target_name)
            if target:  # a pod without the port of that name has none of the service's
                ports[port.port] = target
        found[each.key] = ports
    return found


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


def slice_workloads(each: KubeObject, service: KubeService, cluster: Cluster) -> Iterator[Workload]:
    """The endpoints of a slice that are not pods: somebody wrote their addresses down.

    Nothing is known of such an address but that the service has it, and it
    may be another's too: it is never found by itself.
    """
    ports = _slice_ports(each, service)
    seen: set[str] = set()
    for item in _items(Value.of(each, "endpoints")):
        if item.get("targetRef", "kind").raw == "Pod":
            continue
        listed = item.get("addresses")
        texts = listed.texts() if listed.present else ()
        if not texts or texts[0] in seen:
            continue
        seen.add(texts[0])
        ready = item.get("conditions", "ready").raw is not False
        yield Workload(
            uid=f"{cluster.cluster_id}/discovery.k8s.io/EndpointSlice/"
            f"{each.namespace}/{each.name}/{texts[0]}",
            name=each.name,
            namespace=each.namespace,
            addresses=tuple(address.ip() for address in listed.items()),
            network=cluster.network,
            trust_domain=cluster.trust_domain,
            status=HealthStatus.HEALTHY if ready else HealthStatus.UNHEALTHY,
            cluster_id=cluster.cluster_id,
            services={service.key: ports},
            network_mode=NetworkMode.HOST_NETWORK,
        )


def slice_pods(each: KubeObject) -> Iterator[tuple[str, str]]:
    """(namespace, name) of the pods that a slice names."""
    for item in _items(Value.of(each, "endpoints")):
        if item.get("targetRef", "kind").raw == "Pod":
            named = item.get("targetRef", "name")
            if named.present:
                yield each.namespace, named.text()


def slice_service(each: KubeObject, cluster: Cluster) -> NamespacedHostname | None:
    """Whose endpoints a slice holds; None for one that belongs to no service."""
    name = each.labels.get(SERVICE_NAME)
    if not name or each.body.get("addressType") == "FQDN":
        return None
    return cluster.service_key(each.namespace, name)


def _slice_ports(each: KubeObject, service: KubeService) -> dict[int, int]:
    targets: dict[str, int] = {}
    for item in _items(Value.of(each, "ports")):
        if (item.get("protocol").raw or "TCP") == "TCP" and item.get("port").present:
            targets[str(item.get("name").raw or "")] = item.get("port").integer(1, 65535)
    return {port.port: targets[port.name] for port in service.ports if port.name in targets}


def _first(labels: Mapping[str, str], keys: Iterable[str], default: str) -> str:
    return next((labels[key] for key in keys if key in labels), default)


def _items(value: Value) -> Iterable[Value]:
    return value.items() if value.present else ()
