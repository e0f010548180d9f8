"""Finding the waypoint, or another network's gateway, that a service or workload asks for."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from meshbpf.agent.core.address import SocketAddress
from meshbpf.agent.core.balance import Purpose, pick_endpoint, target_port
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.route import HboneRoute, Lookup, Refused, select_ip
from meshbpf.agent.core.service import LoadBalancerMode, Service
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import GatewayAddress, NetworkAddress, Workload


@dataclass(frozen=True, slots=True)
class Hop:
    """A waypoint or gateway that was found: which workload, at which port, as part of what."""

    workload: Workload
    port: int
    service: Service | None

    @property
    def expected(self) -> frozenset[SpiffeId]:
        """Whom it may prove to be."""
        return expected_identities(self.workload, self.service)


def service_waypoint(service: Service, rng: random.Random) -> GatewayAddress | None:
    """The waypoint for one connection to `service`: drawn by weight where there are several."""
    if service.weighted_waypoints:
        sums = tuple(accumulate(each.weight for each in service.weighted_waypoints))
        if sums[-1] > 0:
            drawn = bisect_right(sums, int(rng.random() * sums[-1]))
            return service.weighted_waypoints[drawn].destination
    return service.waypoint


def all_waypoints(service: Service) -> Iterator[GatewayAddress]:
    """Each waypoint that `service_waypoint` might draw, now or with other weights."""
    if service.waypoint is not None:
        yield service.waypoint
    for each in service.weighted_waypoints:
        yield each.destination


def through_waypoint(
    mesh: Snapshot,
    source: Workload,
    gateway: GatewayAddress,
    service: Service | None,
    target: SocketAddress,
    lookup: Lookup,
) -> HboneRoute | Refused:
    """By way of a waypoint, which is asked for what the client dialed.

    It, not we, picks the endpoint. `service` is what was addressed: a waypoint
    on another network can only be asked for that.
    """
    hop = _find(mesh, source, gateway, Purpose.WAYPOINT, lookup)
    if isinstance(hop, Refused):
        return hop
    if hop.workload.network != source.network:
        return across(mesh, source, hop.workload, hop.service, service, target, lookup)
    address = _address(hop, gateway, target, lookup)
    if isinstance(address, Refused):
        return address
    return HboneRoute(address, str(target), hop.expected, hop.workload, service, target)


def across(
    mesh: Snapshot,
    source: Workload,
    far: Workload,
    far_service: Service | None,
    service: Service | None,
    target: SocketAddress,
    lookup: Lookup,
) -> HboneRoute | Refused:
    """To `far`, an endpoint (or waypoint) on another network: a tunnel within a tunnel.

    The far network's gateway chooses among the endpoints there, so both
    tunnels ask for the service by name and port, and the inner one's other
    end proves an identity of `far_service`'s; the endpoint's own would be too
    narrow. Gateways stand for services only.
    """
    gateway = far.network_gateway
    if gateway is None:
        return Refused(
            f"{far} is on network {far.network!r}, which has no gateway", "other-network"
        )
    if service is None:
        return Refused(
            f"{far} is on network {far.network!r}, and only services are reached across networks",
            "other-network",
        )
    inner = frozenset(() if far_service is None else far_service.subject_alt_names)
    if not inner:
        return Refused(
            f"{far_service or far} names no identity that its endpoints on network "
            f"{far.network!r} could prove",
            "no-identity",
        )
    hop = _find(mesh, source, gateway, Purpose.GATEWAY, lookup)
    if isinstance(hop, Refused):
        return hop
    address = _address(hop, gateway, target, lookup)
    if isinstance(address, Refused):
        return address
    authority = f"{service.hostname}:{target.port}"
    return HboneRoute(address, authority, hop.expected, hop.workload, service, target, inner)


def _find(
    mesh: Snapshot, source: Workload, gateway: GatewayAddress, purpose: Purpose, lookup: Lookup
) -> Hop | Refused:
    port = gateway.hbone_mtls_port
    match named(mesh, source, gateway):
        case None:
            return _unusable(gateway, purpose, "is not in the mesh")
        case Workload() as workload:
            return Hop(workload, port, None)
        case Service() as service:
            balancing = service.load_balancing
            if balancing is not None and balancing.mode is LoadBalancerMode.PASSTHROUGH:
                return _unusable(gateway, purpose, "is a passthrough service")
            endpoint = pick_endpoint(mesh, source, service, port, lookup.rng, purpose=purpose)
            if endpoint is None:
                return _unusable(gateway, purpose, f"has no usable endpoint for port {port}")
            target = target_port(endpoint, service, port)
            if target is None:
                return _unusable(gateway, purpose, f"does not say what port {port} is")
            return Hop(endpoint.workload, target, service)


def _address(
    hop: Hop, gateway: GatewayAddress, target: SocketAddress, lookup: Lookup
) -> SocketAddress | Refused:
    """One named by hostname is dialed in the client's address family, else at that address."""
    wanted = gateway.destination
    ip = select_ip(
        hop.workload,
        wanted.ip if isinstance(wanted, NetworkAddress) else target.ip,
        hop.service,
        lookup,
    )
    return ip if isinstance(ip, Refused) else SocketAddress(ip, hop.port)


def is_waypoint(mesh: Snapshot, source: Workload, gateway: GatewayAddress) -> bool:
    """Whether `source` itself is (one of the workloads behind) `gateway`."""
    match named(mesh, source, gateway):
        case None:
            return False
        case Workload() as workload:
            return workload.uid == source.uid
        case Service() as service:
            return any(e.workload.uid == source.uid for e in mesh.endpoints(service))


def named(mesh: Snapshot, source: Workload, gateway: GatewayAddress) -> Service | Workload | None:
    """What a gateway's reference names: services come first."""
    place = gateway.destination
    if isinstance(place, NetworkAddress):
        return mesh.service_at(place.network, place.ip, source.namespace) or mesh.workload_at(
            place.network, place.ip
        )
    return mesh.service(place.namespace, place.hostname) or mesh.workload_with_hostname(
        place.namespace, place.hostname
    )


def expected_identities(workload: Workload, service: Service | None) -> frozenset[SpiffeId]:
    """Whom the far side may prove to be: the workload, or what its service says."""
    if service is None or not service.subject_alt_names:
        return workload.identities
    return workload.identities.union(service.subject_alt_names)


def _unusable(gateway: GatewayAddress, purpose: Purpose, why: str) -> Refused:
    what, code = ("waypoint", "no-waypoint")
    if purpose is Purpose.GATEWAY:
        what, code = ("network gateway", "no-gateway")
    return Refused(f"{what} {gateway.destination} {why}", code)
