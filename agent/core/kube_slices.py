"""EndpointSlices: endpoints without a pod as bare workloads, and whose pods they name.

As istiod's `endpointSlicesBuilder`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from meshbpf.agent.core.kube_cluster import Cluster
from meshbpf.agent.core.kube_names import SERVICE_NAME
from meshbpf.agent.core.kube_services import KubeService
from meshbpf.agent.core.object_fields import Value
from meshbpf.agent.core.objects import KubeObject
from meshbpf.agent.core.workload import (
    HealthStatus,
    NamespacedHostname,
    NetworkMode,
    Workload,
)


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


def slice_service(
    each: KubeObject, cluster: Cluster, services: Mapping[NamespacedHostname, KubeService]
) -> KubeService | None:
    """Whose endpoints a slice holds; None for one that belongs to no Service."""
    name = each.labels.get(SERVICE_NAME)
    if not name or each.body.get("addressType") == "FQDN":
        return None
    found = services.get(cluster.service_key(each.namespace, name))
    return None if found is None or found.of_entry else found


def _slice_ports(each: KubeObject, service: KubeService) -> dict[int, int]:
    targets: dict[str, int] = {}
    for item in _items(Value.of(each, "ports")):
        if (item.get("protocol").raw or "TCP") == "TCP" and item.get("port").present:
            targets[str(item.get("name").raw or "")] = item.get("port").integer(1, 65535)
    return {port.port: targets[port.name] for port in service.ports if port.name in targets}


def _items(value: Value) -> Iterable[Value]:
    return value.items() if value.present else ()
