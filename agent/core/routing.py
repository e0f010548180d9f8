"""Which way a captured connection goes, outbound and inbound.

Pure: takes a snapshot and returns a route. The outbound order is that of
Istio's ztunnel: a service's waypoint, then an endpoint of the service, then
the addressed workload (through its waypoint, if it has one), then straight
through. An endpoint or waypoint on another network is reached through that
network's gateway. A destination on the same node is tunnelled like any other.
What differs: a waypoint's own connections never go to a waypoint of the same
service again, and an endpoint of another network that has no gateway is never
picked.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable
from ipaddress import IPv6Address

from meshbpf.agent.core.address import AddressError, IPAddress, SocketAddress, address_bits
from meshbpf.agent.core.authority import Authority, HostPort, parse_authority
from meshbpf.agent.core.balance import pick_endpoint, target_port
from meshbpf.agent.core.route import (
    INTERNAL_PORTS,
    NO_NAMES,
    HboneRoute,
    InboundRoute,
    Lookup,
    Names,
    PlainRoute,
    Refused,
    Route,
    select_ip,
)
from meshbpf.agent.core.service import LoadBalancerMode, Service
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.waypoint import (
    across,
    all_waypoints,
    expected_identities,
    is_waypoint,
    service_waypoint,
    through_waypoint,
)
from meshbpf.agent.core.workload import (
    HBONE_PORT,
    ApplicationTunnel,
    GatewayAddress,
    TunnelFraming,
    TunnelProtocol,
    Workload,
)

__all__ = [
    "INTERNAL_PORTS",
    "HboneRoute",
    "InboundRoute",
    "PlainRoute",
    "Refused",
    "Route",
    "inbound_hbone",
    "inbound_plain",
    "outbound",
    "to_endpoint",
]

_LOOPBACK_V4 = 127  # the upper 8 of 32 bits
_LOOPBACK_V6 = address_bits(IPv6Address("::1"))


def outbound(
    mesh: Snapshot,
    source: Workload,
    target: SocketAddress,
    *,
    rng: random.Random,
    names: Names = NO_NAMES,
    internal_ports: Collection[int] = INTERNAL_PORTS,
    spared: frozenset[str] = frozenset(),
) -> Route:
    """Where the connection goes that `source` opened to `target`.

    `rng` draws the endpoint and the waypoint; endpoints of `spared` (by uid) were
    drawn for before, and it is to be one of the others. `names` are hostnames that were
    looked up, for the sake of workloads that have no address but a name: see
    `Refused.unresolved`. Loopback is refused: steering leaves real loopback
    traffic alone, so such a target means that somebody dialed a listener of
    ours by its own port.
    """
    ip = target.ip
    bits = address_bits(ip)
    if bits >> 24 == _LOOPBACK_V4 or bits == _LOOPBACK_V6 or ip.is_unspecified:
        return Refused(f"{target} is this host itself", "loopback")
    lookup = Lookup(names, rng)
    workload = mesh.workload_at(source.network, ip)
    service = mesh.service_at(source.network, ip, source.namespace)

    # A service counts as addressed only where no workload has the address.
    addressed = service if workload is None else None
    if addressed is not None and (addressed.waypoint or addressed.weighted_waypoints):
        gateway = service_waypoint(addressed, rng)
        # With several, they must not send it to one another for ever.
        if gateway is not None and not _from_waypoint(mesh, source, all_waypoints(addressed)):
            return through_waypoint(mesh, source, gateway, addressed, target, lookup)

    port = target.port
    if service is not None:
        balancing = service.load_balancing
        if balancing is not None and balancing.mode is LoadBalancerMode.PASSTHROUGH:
            return PlainRoute(target, None, service)
        endpoint = pick_endpoint(mesh, source, service, port, rng, spared=spared)
        found = None if endpoint is None else target_port(endpoint, service, port)
        if endpoint is None or found is None:
            return _no_endpoint(service, port)
        workload, port = endpoint.workload, found
    elif workload is None:
        return PlainRoute(target, None, None)

    if workload.network != source.network:
        return across(mesh, source, workload, service, addressed, target, lookup)
    if addressed is None and workload.waypoint is not None:
        gateway = workload.waypoint
        if not is_waypoint(mesh, source, gateway):
            return through_waypoint(mesh, source, gateway, service, target, lookup)
    return to_endpoint(workload, service, ip, port, internal_ports, lookup)


def inbound_hbone(
    mesh: Snapshot,
    local: Workload,
    local_addresses: Collection[IPAddress],
    authority: str,
    *,
    arrived_at: IPAddress | None = None,
    internal_ports: Collection[int] = INTERNAL_PORTS,
) -> InboundRoute | Refused:
    """Where a CONNECT for `authority`, made to the pod of `local`, is to be dialed.

    Always in the pod itself. `arrived_at` is the pod's address that the
    tunnel was made to; it is dialed when the authority is a hostname or, for
    a waypoint, an address that it stands for. A pod with an application
    tunnel may be asked for any address: its app gets to know which one.
    """
    try:
        wanted = parse_authority(authority)
    except AddressError as error:
        return Refused(error.what, "bad-authority", 400)
    tunnel = local.application_tunnel
    ip = arrived_at if arrived_at is not None else _first_local(local, local_addresses)
    service: Service | None
    if isinstance(wanted, SocketAddress):
        if wanted.ip in local_addresses:
            ip = wanted.ip
        elif tunnel is None and not _stands_for(mesh, local, wanted.ip):
            return Refused(f"{wanted.ip} is not an address of this pod", "wrong-destination", 400)
        port = wanted.port
        service = _meant_service(mesh, local, port)
    else:
        service = mesh.service_with_hostname(wanted.host, local.namespace)
        if service is None:
            return Refused(f"no service has the hostname {wanted.host}", "unknown-host")
        found = _own_port(local, service, wanted.port)
        if found is None:
            return Refused(f"{service} does not say what port {wanted.port} is", "unknown-port")
        port = found
    if ip is None:
        return Refused("the pod has no address to dial", "no-address")
    route = _to_app(SocketAddress(ip, port), service, internal_ports)
    if tunnel is None or isinstance(route, Refused):
        return route
    return _to_tunnel(tunnel, route, local, wanted, service)


def inbound_plain(
    mesh: Snapshot,
    local: Workload,
    target: SocketAddress,
    *,
    internal_ports: Collection[int] = INTERNAL_PORTS,
) -> InboundRoute | Refused:
    """Where a captured plaintext connection is to be dialed: where it was going."""
    return _to_app(target, _meant_service(mesh, local, target.port), internal_ports)


def to_endpoint(
    workload: Workload,
    service: Service | None,
    wanted: IPAddress,
    port: int,
    internal_ports: Collection[int],
    lookup: Lookup,
) -> Route:
    """Straight to `port` of a workload on our network, at its address of `wanted`'s family."""
    ip = select_ip(workload, wanted, service, lookup)
    if isinstance(ip, Refused):
        return ip
    address = SocketAddress(ip, port)
    if workload.tunnel_protocol is TunnelProtocol.NONE:
        return PlainRoute(address, workload, service)
    if port in internal_ports:
        # The far side would refuse it; a tunnel in a tunnel serves nobody.
        return Refused(f"port {port} belongs to the mesh itself", "internal-port")
    return HboneRoute(
        SocketAddress(ip, HBONE_PORT),
        str(address),
        expected_identities(workload, service),
        workload,
        service,
        address,
    )


def _from_waypoint(mesh: Snapshot, source: Workload, gateways: Iterable[GatewayAddress]) -> bool:
    return any(is_waypoint(mesh, source, gateway) for gateway in gateways)


def _no_endpoint(service: Service, port: int) -> Refused:
    if port not in service.ports:
        return Refused(f"service {service} has no port {port}", "unknown-port")
    return Refused(f"service {service} has no usable endpoint for port {port}", "no-endpoint")


def _to_app(
    target: SocketAddress, service: Service | None, internal_ports: Collection[int]
) -> InboundRoute | Refused:
    if target.port in internal_ports:
        return Refused(f"port {target.port} belongs to the mesh itself", "internal-port")
    bits = address_bits(target.ip)
    if bits >> 24 == _LOOPBACK_V4 or bits == _LOOPBACK_V6:
        return Refused(f"{target} is loopback", "loopback", 400)
    return InboundRoute(target, service)


def _first_local(local: Workload, addresses: Collection[IPAddress]) -> IPAddress | None:
    return next((ip for ip in local.addresses if ip in addresses), None)


def _to_tunnel(
    tunnel: ApplicationTunnel,
    route: InboundRoute,
    local: Workload,
    wanted: Authority,
    service: Service | None,
) -> InboundRoute | Refused:
    target = SocketAddress(route.target.ip, tunnel.port or route.target.port)
    if tunnel.protocol is TunnelFraming.NONE:
        return InboundRoute(target, route.service)
    if isinstance(wanted, HostPort):
        # The header has room for addresses only.
        vip = None if service is None else _shown_address(service, local.network)
        if vip is None:
            return Refused(f"service {service} has no address for a PROXY header", "no-address")
        wanted = SocketAddress(vip, wanted.port)
    return InboundRoute(target, route.service, proxied=wanted)


def _shown_address(service: Service, network: str) -> IPAddress | None:
    """Which of a service's addresses stands for its name: our network's, IPv4 if there is one."""
    best, rank = None, -1
    for address in service.addresses:
        found = 0 if address.network != network else 2 if address.ip.version == 4 else 1
        if found >= rank:  # ztunnel takes the last of equals
            best, rank = address.ip, found
    return best


def _stands_for(mesh: Snapshot, local: Workload, ip: IPAddress) -> bool:
    """Whether `local` is the waypoint of what has this address."""
    workload = mesh.workload_at(local.network, ip)
    if workload is not None:
        return workload.waypoint is not None and is_waypoint(mesh, local, workload.waypoint)
    service = mesh.service_at(local.network, ip, None)
    return service is not None and _from_waypoint(mesh, local, all_waypoints(service))


def _own_port(local: Workload, service: Service, port: int) -> int | None:
    own = local.services.get(service.key)
    target = None if own is None else own.get(port)
    return target or service.ports.get(port) or None


def _meant_service(mesh: Snapshot, local: Workload, port: int) -> Service | None:
    """The one service of `local` that leads to this target port, if just one does."""
    found: Service | None = None
    for key, ports in local.services.items():
        service = mesh.service(key.namespace, key.hostname)
        if service is None:
            continue
        if any((ports.get(own) or target) == port for own, target in service.ports.items()):
            if found is not None:
                return None
            found = service
    return found
