"""Which waypoint a Service or Pod asks for, by its labels and its namespace's.

As Istio's control plane decides (`serviceregistry/ambient/waypoints.go`):

1. `istio.io/use-waypoint` on the object itself; `none` opts out.
2. For pods: a Gateway of their namespace that `istio.io/for-service-account`
   binds to their account. Istio has dropped this annotation; it is an alias here.
3. `istio.io/use-waypoint` on the Namespace.

`istio.io/use-waypoint-namespace` beside the label crosses namespaces, which
the Gateway's HBONE listener must allow. A waypoint is for the traffic that
`istio.io/waypoint-for` says, on the Gateway or else on its GatewayClass
(default: service). Any GatewayClass may hold waypoints, so what makes a
Gateway one is an address to be found at: in its status or, where no
controller writes one, a Service of its own name.

A label that leads nowhere binds nothing and says why: traffic then goes on
without a waypoint, as in Istio, so whoever applied it must be able to see it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from meshbpf.agent.core.address import AddressError, parse_ip
from meshbpf.agent.core.labels import selects
from meshbpf.agent.core.objects import KubeObject, ObjectSet
from meshbpf.agent.core.service import WeightedWaypoint
from meshbpf.agent.core.workload import (
    HBONE_PORT,
    GatewayAddress,
    NamespacedHostname,
    NetworkAddress,
)

GATEWAY_API = "gateway.networking.k8s.io"
USE_WAYPOINT = "istio.io/use-waypoint"
USE_WAYPOINT_NAMESPACE = "istio.io/use-waypoint-namespace"
CANARY = "istio.io/use-waypoint-canary"
CANARY_NAMESPACE = "istio.io/use-waypoint-canary-namespace"
CANARY_WEIGHT = "istio.io/use-waypoint-canary-weight"
WAYPOINT_FOR = "istio.io/waypoint-for"
FOR_SERVICE_ACCOUNT = "istio.io/for-service-account"
MANAGED = "gateway.istio.io/managed"
_GATEWAYS_OWN = frozenset({"istio.io-mesh-controller", "istio.io-eastwest-controller"})
"""Values of MANAGED on Services that are a waypoint's or gateway's own."""
NONE = "none"


class Traffic(StrEnum):
    """Values of `istio.io/waypoint-for`: what a waypoint takes."""

    SERVICE = "service"
    WORKLOAD = "workload"
    ALL = "all"
    NONE = "none"

    @property
    def services(self) -> bool:
        """What is addressed to a Service."""
        return self in (Traffic.SERVICE, Traffic.ALL)

    @property
    def workloads(self) -> bool:
        """What is addressed to a pod."""
        return self in (Traffic.WORKLOAD, Traffic.ALL)


@dataclass(frozen=True, slots=True)
class WaypointGateway:
    """A Gateway as far as bindings need it."""

    namespace: str
    name: str
    traffic: Traffic
    address: GatewayAddress | None
    """None while it has none: nothing can be bound to it."""
    listener: Mapping[str, Any]
    """Its HBONE listener; empty without one."""

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"

    def admits(self, namespace: str, labels: Mapping[str, str]) -> bool:
        """Whether objects of a namespace (with these labels) may be bound to it."""
        allowed = (self.listener.get("allowedRoutes") or {}).get("namespaces") or {}
        match allowed.get("from", "Same"):
            case "All":
                return True
            case "Selector":
                return selects(allowed.get("selector") or {}, labels)
            case _:
                return namespace == self.namespace


@dataclass(frozen=True, slots=True)
class Binding:
    """The answer for one object, and why it is so."""

    gateway: WaypointGateway | None
    why: str
    ignored: bool = False
    """A label asks for a waypoint and is not followed; `why` says what is wrong."""
    canary: WaypointGateway | None = None
    canary_weight: int = 0
    """Of 100 connections."""

    @property
    def address(self) -> GatewayAddress | None:
        """For the mesh state's `waypoint`."""
        return None if self.gateway is None else self.gateway.address

    @property
    def weighted(self) -> tuple[WeightedWaypoint, ...]:
        """For the mesh state's `weighted_waypoints`; empty without a canary."""
        own = self.address
        other = None if self.canary is None else self.canary.address
        if own is None or other is None:
            return ()
        return (
            WeightedWaypoint(own, 100 - self.canary_weight),
            WeightedWaypoint(other, self.canary_weight),
        )


class Bindings:
    """All bindings of one set of objects."""

    def __init__(
        self, objects: ObjectSet, *, cluster_domain: str = "cluster.local", network: str = ""
    ) -> None:
        self._namespaces = {each.name: each for each in objects.of_kind("", "Namespace")}
        self._gateways: dict[tuple[str, str], WaypointGateway] = {}
        self._by_account: dict[tuple[str, str], WaypointGateway] = {}
        for each in objects.of_kind(GATEWAY_API, "Gateway"):
            gateway = _gateway(objects, each, cluster_domain, network)
            self._gateways[each.namespace, each.name] = gateway
            account = each.annotations.get(FOR_SERVICE_ACCOUNT)
            if account:
                self._by_account[each.namespace, account] = gateway

    @property
    def by_account(self) -> bool:
        """Whether any Gateway is bound to an account."""
        return bool(self._by_account)

    def same_as(self, other: Bindings) -> bool:
        """Whether both have the same Gateways, so that only namespaces may differ."""
        return (self._gateways, self._by_account) == (other._gateways, other._by_account)

    def gateway(self, namespace: str, name: str) -> WaypointGateway | None:
        """One Gateway."""
        return self._gateways.get((namespace, name))

    def of_service(self, service: KubeObject) -> Binding:
        """Of a Service or ServiceEntry."""
        if service.labels.get(MANAGED) in _GATEWAYS_OWN:
            return Binding(None, f"{service.key} belongs to a gateway itself")
        found = self._asked(service)
        gateway = found.gateway
        if gateway is None:
            return found
        if not gateway.traffic.services:
            return _ignored(f"{found.why}, which is for {gateway.traffic} traffic")
        return self._with_canary(service, gateway, found.why)

    def of_workload(self, workload: KubeObject, service_account: str = "") -> Binding:
        """Of a Pod or WorkloadEntry that runs under this account."""
        own = USE_WAYPOINT in workload.labels
        if not own and service_account:
            by_account = self._by_account.get((workload.namespace, service_account))
            if by_account is not None:
                why = f"Gateway {by_account} is for service account {service_account}"
                if by_account.address is None:
                    return _ignored(f"{why}, and has no address")
                # The annotation itself says what it is for.
                return Binding(by_account, why)
        found = self._asked(workload)
        gateway = found.gateway
        if gateway is None or gateway.traffic.workloads:
            return found
        why = f"{found.why}, which is for {gateway.traffic} traffic"
        # Inherited from the namespace this is no mistake: it is for services.
        return Binding(None, why, ignored=own)

    # -- steps

    def _asked(self, about: KubeObject) -> Binding:
        namespace = self._namespaces.get(about.namespace)
        for place in (about, namespace):
            name = None if place is None else place.labels.get(USE_WAYPOINT)
            if place is None or name is None:
                continue
            if name == NONE:
                return Binding(None, f"{place.key} has {USE_WAYPOINT}: {NONE}")
            return self._named(
                about, name, place.labels.get(USE_WAYPOINT_NAMESPACE, about.namespace), place
            )
        return Binding(None, f"neither {about.key} nor its namespace has {USE_WAYPOINT}")

    def _named(self, about: KubeObject, name: str, space: str, place: KubeObject) -> Binding:
        why = f"{place.key} asks for waypoint {space}/{name}"
        gateway = self._gateways.get((space, name))
        if gateway is None:
            return _ignored(f"{why}, and there is no such Gateway")
        namespace = self._namespaces.get(about.namespace)
        labels = {} if namespace is None else namespace.labels
        if not gateway.admits(about.namespace, labels):
            return _ignored(
                f"{why}, whose HBONE listener does not allow namespace {about.namespace}"
            )
        if gateway.address is None:
            return _ignored(f"{why}, which has no address")
        return Binding(gateway, why)

    def _with_canary(self, about: KubeObject, gateway: WaypointGateway, why: str) -> Binding:
        """The canary is inherited from the namespace only with the waypoint itself."""
        place = about
        if CANARY not in about.labels and USE_WAYPOINT not in about.labels:
            place = self._namespaces.get(about.namespace, about)
        name = place.labels.get(CANARY, NONE)
        if name in ("", NONE):
            return Binding(gateway, why)
        text = place.annotations.get(CANARY_WEIGHT, "0")
        if not (text.isdecimal() and int(text) <= 100):
            return Binding(
                gateway, f"{why}; canary: {CANARY_WEIGHT} {text!r} is not 0 to 100", ignored=True
            )
        space = place.labels.get(CANARY_NAMESPACE, about.namespace)
        canary = self._named(about, name, space, place)
        if canary.gateway is None or not canary.gateway.traffic.services:
            return Binding(gateway, f"{why}; canary: {canary.why}", ignored=True)
        return Binding(gateway, why, canary=canary.gateway, canary_weight=int(text))


def _ignored(why: str) -> Binding:
    return Binding(None, why, ignored=True)


def _gateway(
    objects: ObjectSet, gateway: KubeObject, cluster_domain: str, network: str
) -> WaypointGateway:
    kind = objects.get(GATEWAY_API, "GatewayClass", "", gateway.spec.get("gatewayClassName") or "")
    wanted = gateway.labels.get(WAYPOINT_FOR) or (kind.labels if kind else {}).get(WAYPOINT_FOR)
    # A value that nobody knows takes nothing, as in Istio.
    known = {each.value: each for each in Traffic}
    traffic = known.get(wanted or Traffic.SERVICE, Traffic.NONE)
    listeners = gateway.spec.get("listeners") or ()
    hbone = [each for each in listeners if each.get("protocol") == "HBONE"]
    address = _address(gateway, network)
    if address is None and objects.get("", "Service", gateway.namespace, gateway.name) is not None:
        hostname = f"{gateway.name}.{gateway.namespace}.svc.{cluster_domain}"
        address = GatewayAddress(NamespacedHostname(gateway.namespace, hostname), HBONE_PORT)
    return WaypointGateway(
        gateway.namespace, gateway.name, traffic, address, hbone[0] if hbone else {}
    )


def _address(gateway: KubeObject, network: str) -> GatewayAddress | None:
    """From the status; a hostname is the better key, for addresses may be given anew."""
    status = gateway.body.get("status") or {}
    addresses = status.get("addresses") or ()
    for each in addresses:
        if each.get("type") == "Hostname":
            name = NamespacedHostname(gateway.namespace, each.get("value", ""))
            return GatewayAddress(name, HBONE_PORT)
    for each in addresses:
        if each.get("type", "IPAddress") != "IPAddress":
            continue
        try:
            ip = parse_ip(each.get("value", ""))
        except AddressError:
            continue  # the next one may be better; with none the Gateway has no address
        return GatewayAddress(NetworkAddress(network, ip), HBONE_PORT)
    return None
