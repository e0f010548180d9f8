"""The workloads and services of a LOCAL_XDS file, key by key.

The keys are those of ztunnel's `LocalWorkload` and `Service` (its
src/xds.rs, src/state/workload.rs and service.rs), in camelCase. A missing key
means what a missing field means to ztunnel over xDS.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from meshbpf.agent.core.fields import Field
from meshbpf.agent.core.identity import DEFAULT_TRUST_DOMAIN
from meshbpf.agent.core.service import (
    HealthPolicy,
    IPFamilies,
    LoadBalancerMode,
    LoadBalancerScope,
    LoadBalancing,
    NetworkCidr,
    Service,
    ServiceEndpoint,
    Visibility,
    WeightedWaypoint,
)
from meshbpf.agent.core.workload import (
    DEFAULT_CLUSTER,
    DEFAULT_SERVICE_ACCOUNT,
    HBONE_PORT,
    ApplicationTunnel,
    GatewayAddress,
    HealthStatus,
    Locality,
    NamespacedHostname,
    NetworkAddress,
    NetworkMode,
    TunnelFraming,
    TunnelProtocol,
    Workload,
)

_PROTOCOLS = {"TCP": TunnelProtocol.NONE, "HBONE": TunnelProtocol.HBONE}
_NETWORK_MODES = {"Standard": NetworkMode.STANDARD, "HostNetwork": NetworkMode.HOST_NETWORK}
_FRAMINGS = {"NONE": TunnelFraming.NONE, "PROXY": TunnelFraming.PROXY}
_STATUSES = {"Healthy": HealthStatus.HEALTHY, "Unhealthy": HealthStatus.UNHEALTHY}
_MODES = {
    "Standard": LoadBalancerMode.UNSPECIFIED,
    "Strict": LoadBalancerMode.STRICT,
    "Failover": LoadBalancerMode.FAILOVER,
    "Passthrough": LoadBalancerMode.PASSTHROUGH,
}
_SCOPES = {
    "Region": LoadBalancerScope.REGION,
    "Zone": LoadBalancerScope.ZONE,
    "Subzone": LoadBalancerScope.SUBZONE,
    "Node": LoadBalancerScope.NODE,
    "Cluster": LoadBalancerScope.CLUSTER,
    "Network": LoadBalancerScope.NETWORK,
}
_HEALTH = {"OnlyHealthy": HealthPolicy.ONLY_HEALTHY, "AllowAll": HealthPolicy.ALLOW_ALL}
_FAMILIES = {"Dual": IPFamilies.DUAL, "IPv4": IPFamilies.IPV4_ONLY, "IPv6": IPFamilies.IPV6_ONLY}
_VISIBILITIES = {"Public": Visibility.PUBLIC, "Namespace": Visibility.NAMESPACE}

_WORKLOAD_KEYS = (
    "workloadIps",
    "waypoint",
    "networkGateway",
    "protocol",
    "networkMode",
    "uid",
    "name",
    "namespace",
    "trustDomain",
    "serviceAccount",
    "network",
    "workloadName",
    "workloadType",
    "canonicalName",
    "canonicalRevision",
    "hostname",
    "node",
    "nativeTunnel",
    "applicationTunnel",
    "authorizationPolicies",
    "status",
    "clusterId",
    "locality",
    "services",
    "capacity",
)
_SERVICE_KEYS = (
    "name",
    "namespace",
    "hostname",
    "vips",
    "cidrVips",
    "ports",
    "endpoints",
    "subjectAltNames",
    "waypoint",
    "weightedWaypoints",
    "loadBalancer",
    "ipFamilies",
    "canonical",
    "visibility",
)
_U32 = 2**32 - 1
E = TypeVar("E")


def read_workload(field: Field) -> Workload:
    """One item of `workloads`."""
    fields = field.record(_WORKLOAD_KEYS)

    def text(key: str, default: str = "") -> str:
        found = fields.get(key)
        return default if found is None else found.text(empty=True) or default

    def identity_part(key: str, default: str) -> str:
        return fields[key].identity_part() if text(key) else default

    namespace = field.need(fields, "namespace").identity_part()
    name = text("name")
    cluster = text("clusterId", DEFAULT_CLUSTER)
    uid = text("uid")
    if not uid:
        if not name:
            raise field.error("uid is missing, and there is no name to make one of")
        uid = f"{cluster}//Pod/{namespace}/{name}"  # as istiod forms it
    addresses = tuple(item.ip() for item in field.need(fields, "workloadIps").items())
    policies = fields.get("authorizationPolicies")
    services = fields.get("services")
    capacity = fields.get("capacity")
    native_tunnel = fields.get("nativeTunnel")
    return Workload(
        uid=uid,
        name=name,
        namespace=namespace,
        addresses=addresses,
        network=text("network"),
        tunnel_protocol=_choice(fields, "protocol", _PROTOCOLS, TunnelProtocol.NONE),
        trust_domain=identity_part("trustDomain", DEFAULT_TRUST_DOMAIN),
        service_account=identity_part("serviceAccount", DEFAULT_SERVICE_ACCOUNT),
        waypoint=_gateway(fields.get("waypoint")),
        node=text("node"),
        canonical_name=text("canonicalName"),
        canonical_revision=text("canonicalRevision"),
        workload_type=text("workloadType"),
        workload_name=text("workloadName"),
        native_tunnel=native_tunnel is not None and native_tunnel.boolean(),
        authorization_policies=()
        if policies is None
        else tuple(_policy_key(item) for item in policies.items()),
        status=_choice(fields, "status", _STATUSES, HealthStatus.HEALTHY),
        cluster_id=cluster,
        network_gateway=_gateway(fields.get("networkGateway")),
        hostname=text("hostname"),
        services={} if services is None else _services(services),
        application_tunnel=_tunnel(fields.get("applicationTunnel")),
        locality=_locality(fields.get("locality")),
        network_mode=_choice(fields, "networkMode", _NETWORK_MODES, NetworkMode.STANDARD),
        capacity=1 if capacity is None else capacity.integer(0, _U32),
    )


def read_service(field: Field) -> Service:
    """One item of `services`."""
    fields = field.record(_SERVICE_KEYS)

    def items(key: str) -> list[Field]:
        return list(fields[key].items()) if key in fields else []

    canonical = fields.get("canonical")
    endpoints = fields.get("endpoints")
    return Service(
        name=field.need(fields, "name").text(),
        namespace=field.need(fields, "namespace").text(),
        hostname=field.need(fields, "hostname").text(),
        addresses=tuple(_network_address(item) for item in items("vips")),
        cidr_addresses=tuple(_network_cidr(item) for item in items("cidrVips")),
        ports=_ports(field.need(fields, "ports"), lowest_target=0),
        subject_alt_names=tuple(item.spiffe() for item in items("subjectAltNames")),
        waypoint=_gateway(fields.get("waypoint")),
        weighted_waypoints=tuple(_weighted(item) for item in items("weightedWaypoints")),
        load_balancing=_load_balancing(fields.get("loadBalancer")),
        ip_families=_choice(fields, "ipFamilies", _FAMILIES, IPFamilies.AUTOMATIC),
        canonical=canonical is not None and canonical.boolean(),
        visibility=_choice(fields, "visibility", _VISIBILITIES, Visibility.PUBLIC),
        endpoints=() if endpoints is None else _endpoints(endpoints),
    )


def _choice(fields: Mapping[str, Field], key: str, table: Mapping[str, E], default: E) -> E:
    found = fields.get(key)
    return default if found is None or found.is_null else found.choice(table)


def _services(field: Field) -> dict[NamespacedHostname, Mapping[int, int]]:
    found: dict[NamespacedHostname, Mapping[int, int]] = {}
    for key, ports in field.entries():
        namespace, hostname = _two_parts(key, key.text(), "NAMESPACE/HOSTNAME")
        # An endpoint's own target cannot be 0: that would name a port by nothing.
        found[NamespacedHostname(namespace, hostname)] = _ports(ports, lowest_target=1)
    return found


def _ports(field: Field, *, lowest_target: int) -> dict[int, int]:
    return {key.port(): value.port(lowest_target) for key, value in field.entries()}


def _endpoints(field: Field) -> tuple[ServiceEndpoint, ...]:
    found: list[ServiceEndpoint] = []
    for key, value in field.entries():
        fields = value.record(("workloadUid", "port", "status"))
        uid = value.need(fields, "workloadUid")
        if uid.text() != key.text():
            raise uid.error(f"{uid.text()!r} is not the key under which the endpoint stands")
        ports = fields.get("port")
        found.append(
            ServiceEndpoint(
                uid.text(),
                {} if ports is None else _ports(ports, lowest_target=1),
                _choice(fields, "status", _STATUSES, HealthStatus.HEALTHY),
            )
        )
    return tuple(found)


def _gateway(field: Field | None) -> GatewayAddress | None:
    if field is None or field.is_null:
        return None
    fields = field.record(("destination", "hboneMtlsPort"))
    named = field.need(fields, "destination")
    text = named.text()
    before, slash, after = text.partition("/")
    destination: NetworkAddress | NamespacedHostname
    if slash and _looks_like_ip(after):
        destination = NetworkAddress(before, named.checked_ip(after))
    else:
        namespace, hostname = _two_parts(named, text, "NETWORK/IP or NAMESPACE/HOSTNAME")
        destination = NamespacedHostname(namespace, hostname)
    port = fields.get("hboneMtlsPort")
    return GatewayAddress(destination, HBONE_PORT if port is None else port.port())


def _tunnel(field: Field | None) -> ApplicationTunnel | None:
    if field is None or field.is_null:
        return None
    fields = field.record(("protocol", "port"))
    port = fields.get("port")
    return ApplicationTunnel(
        field.need(fields, "protocol").choice(_FRAMINGS),
        None if port is None or port.is_null else port.port(),
    )


def _weighted(field: Field) -> WeightedWaypoint:
    fields = field.record(("destination", "weight"))
    destination = _gateway(field.need(fields, "destination"))
    if destination is None:
        raise fields["destination"].error("must not be empty")
    return WeightedWaypoint(destination, field.need(fields, "weight").integer(0, _U32))


def _load_balancing(field: Field | None) -> LoadBalancing | None:
    if field is None or field.is_null:
        return None
    fields = field.record(("routingPreferences", "mode", "healthPolicy"))
    scopes: list[LoadBalancerScope] = []
    if "routingPreferences" in fields:
        for item in fields["routingPreferences"].items():
            scope = item.choice(_SCOPES)
            if scope in scopes:
                raise item.error("this scope is in the list already")
            scopes.append(scope)
    return LoadBalancing(
        tuple(scopes),
        _choice(fields, "mode", _MODES, LoadBalancerMode.UNSPECIFIED),
        _choice(fields, "healthPolicy", _HEALTH, HealthPolicy.ONLY_HEALTHY),
    )


def _locality(field: Field | None) -> Locality:
    if field is None or field.is_null:
        return Locality()
    fields = field.record(("region", "zone", "subzone"))
    return Locality(**{key: value.text(empty=True) for key, value in fields.items()})


def _network_address(field: Field) -> NetworkAddress:
    network, slash, ip = field.text().partition("/")
    if not slash:
        raise field.error(f"{field.text()!r} is not NETWORK/IP (the network may be empty: /IP)")
    return NetworkAddress(network, field.checked_ip(ip))


def _network_cidr(field: Field) -> NetworkCidr:
    fields = field.record(("network", "cidr"))
    cidr = field.need(fields, "cidr")
    network = fields.get("network")
    return NetworkCidr(
        "" if network is None else network.text(empty=True), cidr.checked_cidr(cidr.text())
    )


def _policy_key(field: Field) -> str:
    _two_parts(field, field.text(), "NAMESPACE/NAME")
    return field.text()


def _two_parts(field: Field, text: str, form: str) -> tuple[str, str]:
    first, _, second = text.partition("/")
    if not first or not second or "/" in second:
        raise field.error(f"{text!r} is not {form}")
    return first, second


def _looks_like_ip(text: str) -> bool:
    return ":" in text or text.replace(".", "").isdigit()
