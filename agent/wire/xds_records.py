"""Istio's workload API, read into the records of the mesh.

What one resource holds wrongly is that resource's fault alone: RecordError
says which and why, and its neighbours are taken. Values that many records
share (names, localities, the services of a deployment's pods) are kept once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_network
from sys import intern
from typing import Any, Final, TypeVar

from google.protobuf.message import DecodeError

from meshbpf.agent.core.address import IPAddress, canonical_ip
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.identity import DEFAULT_TRUST_DOMAIN, SpiffeId
from meshbpf.agent.core.service import (
    HealthPolicy,
    IPFamilies,
    LoadBalancerMode,
    LoadBalancerScope,
    LoadBalancing,
    NetworkCidr,
    Service,
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
from meshbpf.agent.wire.pb import workload_pb2 as pb

E = TypeVar("E")

_TUNNELS: Final[Mapping[int, TunnelProtocol]] = {
    pb.NONE: TunnelProtocol.NONE,
    pb.HBONE: TunnelProtocol.HBONE,
}
_MODES: Final[Mapping[int, NetworkMode]] = {
    pb.STANDARD: NetworkMode.STANDARD,
    pb.HOST_NETWORK: NetworkMode.HOST_NETWORK,
}
_HEALTH: Final[Mapping[int, HealthStatus]] = {
    pb.HEALTHY: HealthStatus.HEALTHY,
    pb.UNHEALTHY: HealthStatus.UNHEALTHY,
}
_TYPES: Final = {number: name.lower() for name, number in pb.WorkloadType.items()}
_FRAMINGS: Final[Mapping[int, TunnelFraming]] = {
    pb.ApplicationTunnel.NONE: TunnelFraming.NONE,
    pb.ApplicationTunnel.PROXY: TunnelFraming.PROXY,
}
_FAMILIES: Final = {number: IPFamilies(name) for name, number in pb.IPFamilies.items()}
_VISIBILITY: Final = {n: Visibility(name) for name, n in pb.Service.Visibility.items()}
_SCOPES: Final = {
    number: LoadBalancerScope(name)
    for name, number in pb.LoadBalancing.Scope.items()
    if name != "UNSPECIFIED_SCOPE"
}
_BALANCING: Final = {
    number: LoadBalancerMode(name.removesuffix("_MODE"))
    for name, number in pb.LoadBalancing.Mode.items()
}
_HEALTH_POLICIES: Final = {
    number: HealthPolicy(name) for name, number in pb.LoadBalancing.HealthPolicy.items()
}
_NOWHERE: Final = Locality()
_NO_SERVICES: Final[Mapping[NamespacedHostname, Mapping[int, int]]] = {}
# Distinct values that are kept for sharing; then the pool starts over.
_POOL: Final = 65_536


class RecordError(MeshbpfError):
    """A resource of the control plane that cannot be taken."""

    def __init__(self, what: str) -> None:
        super().__init__("bad-resource", what)


class RecordReader:
    """Reads resources and shares what is alike among all that it has read."""

    def __init__(self) -> None:
        self._pool: dict[Any, Any] = {}

    def address(self, name: str, payload: bytes) -> Workload | Service:
        """An `istio.workload.Address`, published as `name`. Raises RecordError."""
        try:
            message = pb.Address.FromString(payload)
        except DecodeError as error:
            raise RecordError(f"not an istio.workload.Address: {error}") from None
        record: Workload | Service
        try:
            match message.WhichOneof("type"):
                case "workload":
                    record = self._workload(message.workload)
                    key = record.uid
                case "service":
                    record = self._service(message.service)
                    key = str(record.key)
                case _:
                    raise RecordError("neither a workload nor a service")
        except RecordError:
            raise
        except MeshbpfError as error:
            raise RecordError(error.what) from None
        # It will be removed by its name: another key would stay for ever.
        if key != name:
            raise RecordError(f"it is {key!r} inside")
        return record

    def _share(self, value: E) -> E:
        if len(self._pool) >= _POOL:
            self._pool.clear()
        found: E = self._pool.setdefault(value, value)
        return found

    def _workload(self, one: pb.Workload) -> Workload:
        return Workload(
            uid=one.uid or _missing("uid"),
            name=one.name,
            namespace=intern(one.namespace),
            addresses=tuple([_ip(raw) for raw in one.addresses]),
            network=intern(one.network),
            tunnel_protocol=_known(_TUNNELS, one.tunnel_protocol, "tunnel protocol"),
            trust_domain=intern(one.trust_domain) or DEFAULT_TRUST_DOMAIN,
            service_account=intern(one.service_account) or DEFAULT_SERVICE_ACCOUNT,
            waypoint=self._gateway(one.waypoint) if one.HasField("waypoint") else None,
            node=intern(one.node),
            canonical_name=intern(one.canonical_name),
            canonical_revision=intern(one.canonical_revision),
            workload_type=_known(_TYPES, one.workload_type, "workload type"),
            workload_name=intern(one.workload_name),
            native_tunnel=one.native_tunnel,
            authorization_policies=self._share(tuple(map(intern, one.authorization_policies))),
            status=_known(_HEALTH, one.status, "status"),
            cluster_id=intern(one.cluster_id) or DEFAULT_CLUSTER,
            network_gateway=self._gateway(one.network_gateway)
            if one.HasField("network_gateway")
            else None,
            hostname=one.hostname,
            services=self._services(one.services) if one.services else _NO_SERVICES,
            application_tunnel=_tunnel(one.application_tunnel)
            if one.HasField("application_tunnel")
            else None,
            locality=self._locality(one.locality) if one.HasField("locality") else _NOWHERE,
            network_mode=_known(_MODES, one.network_mode, "network mode"),
            capacity=one.capacity.value if one.HasField("capacity") else 1,
        )

    def _service(self, one: pb.Service) -> Service:
        addresses: list[NetworkAddress] = []
        cidrs: list[NetworkCidr] = []
        for each in one.addresses:
            ip, network = _ip(each.address), intern(each.network)
            if each.HasField("length") and each.length != ip.max_prefixlen:
                if each.length > ip.max_prefixlen:
                    raise RecordError(f"{ip}/{each.length} is not a prefix")
                cidrs.append(NetworkCidr(network, ip_network((ip, each.length), strict=False)))
            else:
                addresses.append(NetworkAddress(network, ip))
        return Service(
            name=one.name,
            namespace=intern(one.namespace or _missing("namespace")),
            hostname=intern(one.hostname or _missing("hostname")),
            addresses=tuple(addresses),
            cidr_addresses=tuple(cidrs),
            ports=self._ports(one.ports),
            subject_alt_names=tuple(_identities(one.subject_alt_names)),
            waypoint=self._gateway(one.waypoint) if one.HasField("waypoint") else None,
            weighted_waypoints=tuple(
                WeightedWaypoint(self._gateway(each.destination), each.weight)
                for each in one.weighted_waypoints
            ),
            load_balancing=self._balancing(one.load_balancing)
            if one.HasField("load_balancing")
            else None,
            ip_families=_known(_FAMILIES, one.ip_families, "IP families"),
            canonical=one.canonical,
            # As ztunnel: what is not known is public, or the service would be gone.
            visibility=_VISIBILITY.get(one.visibility, Visibility.PUBLIC),
        )

    def _gateway(self, one: pb.GatewayAddress) -> GatewayAddress:
        destination: NamespacedHostname | NetworkAddress
        match one.WhichOneof("destination"):
            case "hostname":
                destination = self._hostname(one.hostname.namespace, one.hostname.hostname)
            case "address":
                destination = NetworkAddress(intern(one.address.network), _ip(one.address.address))
            case _:
                raise RecordError("a waypoint or gateway without an address")
        port = one.hbone_mtls_port or HBONE_PORT
        return self._share(GatewayAddress(destination, _port(port, 1)))

    def _hostname(self, namespace: str, hostname: str) -> NamespacedHostname:
        return self._share(NamespacedHostname(intern(namespace), intern(hostname)))

    def _services(
        self, one: Mapping[str, pb.PortList]
    ) -> Mapping[NamespacedHostname, Mapping[int, int]]:
        key = ("services", *sorted((name, of.SerializeToString()) for name, of in one.items()))
        found: Mapping[NamespacedHostname, Mapping[int, int]] | None = self._pool.get(key)
        if found is None:
            read: dict[NamespacedHostname, Mapping[int, int]] = {}
            for name, ports in one.items():
                namespace, slash, hostname = name.partition("/")
                if not slash:
                    raise RecordError(f"service {name!r} is not NAMESPACE/HOSTNAME")
                read[self._hostname(namespace, hostname)] = self._ports(ports.ports)
            if len(self._pool) >= _POOL:
                self._pool.clear()
            found = self._pool[key] = read
        return found

    def _ports(self, ports: Iterable[pb.Port]) -> Mapping[int, int]:
        found = {_port(one.service_port, 1): _port(one.target_port, 0) for one in ports}
        shared: Mapping[int, int] = self._pool.setdefault(("ports", *found.items()), found)
        return shared

    def _locality(self, one: pb.Locality) -> Locality:
        return self._share(Locality(one.region, one.zone, one.subzone))

    def _balancing(self, one: pb.LoadBalancing) -> LoadBalancing:
        scopes = [_known(_SCOPES, each, "balancing scope") for each in one.routing_preference]
        return self._share(
            LoadBalancing(
                tuple(scopes),
                _known(_BALANCING, one.mode, "balancing mode"),
                _known(_HEALTH_POLICIES, one.health_policy, "health policy"),
            )
        )


def _tunnel(one: pb.ApplicationTunnel) -> ApplicationTunnel:
    framing = _known(_FRAMINGS, one.protocol, "tunnel framing")
    return ApplicationTunnel(framing, _port(one.port, 1) if one.port else None)


def _ip(raw: bytes) -> IPAddress:
    if len(raw) == 4:
        return IPv4Address(raw)
    if len(raw) == 16:
        return canonical_ip(IPv6Address(raw))
    raise RecordError(f"an address of {len(raw)} bytes")


def _port(value: int, lowest: int) -> int:
    if not lowest <= value <= 65535:
        raise RecordError(f"port {value}")
    return value


def _known(table: Mapping[int, E], value: int, what: str) -> E:
    found = table.get(value)
    if found is None:
        raise RecordError(f"{what} {value} is not known to this version")
    return found


def _missing(what: str) -> str:
    raise RecordError(f"no {what}")


def _identities(texts: Iterable[str]) -> Iterable[SpiffeId]:
    for text in texts:
        try:
            yield SpiffeId.parse(text)
        except MeshbpfError:
            # Names of other kinds widen nothing: no peer proves them to us.
            continue
