"""EndpointSlices: endpoints without a pod as bare workloads, and whose pods they name.

As istiod's `endpointSlicesBuilder`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping

from meshbpf.agent.core.kube_cluster import Cluster
from meshbpf.agent.core.kube_names import SERVICE_NAME
from meshbpf.agent.core.kube_services import KubeService
from meshbpf.agent.core.object_fields import Value
from meshbpf.agent.core.objects import KubeObject, ObjectKey
from meshbpf.agent.core.workload import (
    HealthStatus,
    NamespacedHostname,
    NetworkMode,
    Workload,
)

PodName = tuple[str, str]
"""(namespace, name); of a Service too."""
_NOBODY: frozenset[PodName] = frozenset()


class Slices:
    """Which slices a service has, and which of those that somebody wrote name a pod."""

    def __init__(self) -> None:
        self._of_service: dict[PodName, set[ObjectKey]] = defaultdict(set)
        self._pods: dict[ObjectKey, frozenset[PodName]] = {}
        self._naming: dict[PodName, set[ObjectKey]] = defaultdict(set)

    def put(self, key: ObjectKey, old: KubeObject | None, new: KubeObject | None) -> None:
        """Take note of whose a slice is."""
        for each, there in ((old, False), (new, True)):
            name = "" if each is None else each.labels.get(SERVICE_NAME, "")
            if name and there:
                self._of_service[key.namespace, name].add(key)
            elif name:
                _discard(self._of_service, (key.namespace, name), key)

    def of_service(self, namespace: str, name: str) -> Iterable[ObjectKey]:
        """All slices of a Service."""
        return self._of_service.get((namespace, name), ())

    def naming(self, namespace: str, pod: str) -> Collection[ObjectKey]:
        """The slices that give a pod to a service without a selector."""
        return self._naming.get((namespace, pod), ())

    def name(self, key: ObjectKey, pods: Iterable[PodName]) -> frozenset[PodName]:
        """Let a slice give these pods to its service; all that it gave before or gives now."""
        before, now = self._pods.pop(key, _NOBODY), frozenset(pods)
        for pod in before - now:
            _discard(self._naming, pod, key)
        for pod in now - before:
            self._naming[pod].add(key)
        if now:
            self._pods[key] = now
        return before | now


def _discard(index: dict[PodName, set[ObjectKey]], name: PodName, key: ObjectKey) -> None:
    index[name].discard(key)
    if not index[name]:
        del index[name]


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


def slice_pods(each: KubeObject) -> Iterator[PodName]:
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
