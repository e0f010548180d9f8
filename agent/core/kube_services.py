"""Kubernetes Services as the mesh's services: addresses, ports, balancing.

As istiod's `constructService`. An ExternalName service is none: its name
resolves to another's, and that one is what a connection reaches. ServiceEntries
(kube_service_entries.py) take the same form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from meshbpf.agent.core.kube_cluster import Cluster, Problems, age
from meshbpf.agent.core.kube_names import TRAFFIC_DISTRIBUTION
from meshbpf.agent.core.kube_waypoints import Waypoints
from meshbpf.agent.core.object_fields import Value
from meshbpf.agent.core.objects import KubeObject, ObjectKey
from meshbpf.agent.core.service import (
    HealthPolicy,
    IPFamilies,
    LoadBalancerMode,
    LoadBalancerScope,
    LoadBalancing,
    Service,
)
from meshbpf.agent.core.workload import NamespacedHostname, NetworkAddress

_SAME_ZONE = (LoadBalancerScope.NETWORK, LoadBalancerScope.REGION, LoadBalancerScope.ZONE)
_SAME_NODE = (*_SAME_ZONE, LoadBalancerScope.SUBZONE, LoadBalancerScope.NODE)
_DISTRIBUTIONS = {
    "preferclose": _SAME_ZONE,
    "prefersamezone": _SAME_ZONE,
    "prefersamenode": _SAME_NODE,
}


@dataclass(frozen=True, slots=True)
class ServicePort:
    """One TCP port of a service, as workloads and EndpointSlices must know it."""

    name: str
    port: int
    target: int
    """0 where each pod has its own, under `target_name`."""
    target_name: str


@dataclass(frozen=True, slots=True)
class KubeService:
    """A Service, or one host of a ServiceEntry, that was understood."""

    service: Service
    selector: Mapping[str, str]
    ports: tuple[ServicePort, ...]
    owner: KubeObject = field(compare=False)

    @property
    def key(self) -> NamespacedHostname:
        """The mesh's key of it."""
        return self.service.key

    @property
    def of_entry(self) -> bool:
        """It is a host of a ServiceEntry."""
        return self.owner.key.kind == "ServiceEntry"

    @property
    def age(self) -> tuple[bool, tuple[str, ObjectKey]]:
        """Sorts whom a hostname is given to: Services first, then the oldest."""
        return self.of_entry, age(self.owner)


def target_ports(
    services: Iterable[KubeService], named: Callable[[str], int | None], *, by_port_name: bool
) -> dict[NamespacedHostname, Mapping[int, int]]:
    """A workload's own port for each port of its services; `named` gives those that have a name.

    A Service names its target port where each workload has its own. For a
    ServiceEntry, and wherever `by_port_name`, a workload may have one under the
    name of the service's port, and need not.
    """
    found: dict[NamespacedHostname, Mapping[int, int]] = {}
    for each in services:
        ports: dict[int, int] = {}
        for port in each.ports:
            target: int | None = port.target
            if port.target_name:
                target = named(port.target_name)
            elif port.name and (by_port_name or each.of_entry):
                target = named(port.name) or target
            if target:  # a workload without the port of that name has none of the service's
                ports[port.port] = target
        found[each.key] = ports
    return found


def read_service(
    owner: KubeObject,
    namespace: KubeObject | None,
    cluster: Cluster,
    waypoints: Waypoints,
    problems: Problems,
) -> KubeService | None:
    """One Service; None for an external name. Raises ObjectError."""
    spec = Value.spec(owner)
    if spec.get("type").raw == "ExternalName":
        return None
    key = cluster.service_key(owner.namespace, owner.name)
    ports = _ports(spec)
    selector = spec.get("selector").labels()
    addresses = _addresses(spec, cluster)
    balancing = _balancing(owner, spec, namespace)
    families = _families(spec)
    binding = waypoints.of_service(owner, problems)
    service = Service(
        name=owner.name,
        namespace=owner.namespace,
        hostname=key.hostname,
        addresses=addresses,
        ports={port.port: port.target for port in ports},
        waypoint=binding.address,
        weighted_waypoints=binding.weighted,
        load_balancing=balancing,
        ip_families=families,
        canonical=True,  # what else bears its name holds in its own namespace alone
    )
    return KubeService(service, selector, ports, owner)


def _ports(spec: Value) -> tuple[ServicePort, ...]:
    listed = spec.get("ports")
    found: list[ServicePort] = []
    for item in listed.items() if listed.present else ():
        if (item.get("protocol").raw or "TCP") != "TCP":
            continue  # istiod sends these too, but nothing of the mesh carries them
        port = item.get("port").integer(1, 65535)
        target = item.get("targetPort")
        named = isinstance(target.raw, str) and not target.raw.isdigit()
        number = 0
        if not named:
            # As the API server defaults it: an absent target is the port itself.
            absent = target.raw in (None, 0, "0")
            number = int(target.raw) if isinstance(target.raw, str) and not absent else 0
            if not absent and not number:
                number = target.integer(1, 65535)
            number = number or port
        name = item.get("name")
        found.append(
            ServicePort(
                name=name.text(empty=True) if name.present else "",
                port=port,
                target=number,
                target_name=target.text() if named else "",
            )
        )
    return tuple(found)


def _addresses(spec: Value, cluster: Cluster) -> tuple[NetworkAddress, ...]:
    listed = spec.get("clusterIPs")
    items = list(listed.items()) if listed.present else []
    if not items and spec.get("clusterIP").present:
        items = [spec.get("clusterIP")]
    return tuple(
        NetworkAddress(cluster.network, item.ip())
        for item in items
        if item.raw not in ("", "None")  # None: headless, its pods' addresses are its own
    )


def _balancing(
    owner: KubeObject, spec: Value, namespace: KubeObject | None
) -> LoadBalancing | None:
    local = spec.get("internalTrafficPolicy").raw == "Local"
    scopes: tuple[LoadBalancerScope, ...] = ()
    mode = LoadBalancerMode.UNSPECIFIED
    if local:
        scopes, mode = (LoadBalancerScope.NODE,), LoadBalancerMode.STRICT
    else:
        distribution = str(spec.get("trafficDistribution").raw or "")
        scopes = preferred_scopes(owner, namespace, distribution)
        mode = LoadBalancerMode.FAILOVER if scopes else mode
    all_of_them = spec.get("publishNotReadyAddresses").raw is True
    if not scopes and not all_of_them:
        return None
    health = HealthPolicy.ALLOW_ALL if all_of_them else HealthPolicy.ONLY_HEALTHY
    return LoadBalancing(scopes, mode, health)


def preferred_scopes(
    owner: KubeObject, namespace: KubeObject | None, field: str = ""
) -> tuple[LoadBalancerScope, ...]:
    """By the field, else the service's annotation, else its namespace's."""
    if field.lower() in _DISTRIBUTIONS:
        return _DISTRIBUTIONS[field.lower()]
    own = owner.annotations.get(TRAFFIC_DISTRIBUTION, "").lower()
    above = "" if namespace is None else namespace.annotations.get(TRAFFIC_DISTRIBUTION, "").lower()
    return _DISTRIBUTIONS.get(own or above, ())


def _families(spec: Value) -> IPFamilies:
    listed = spec.get("ipFamilies")
    found = listed.texts() if listed.present else ()
    if len(found) == 2:
        return IPFamilies.DUAL
    if len(found) == 1:
        return IPFamilies.IPV4_ONLY if found[0] == "IPv4" else IPFamilies.IPV6_ONLY
    return IPFamilies.AUTOMATIC
