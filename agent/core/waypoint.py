"""Finding the waypoint that a service or workload asks for."""

from __future__ import annotations

import random
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

from meshbpf.agent.core.address import SocketAddress
from meshbpf.agent.core.balance import pick_endpoint, target_port
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.route import Refused, select_ip
from meshbpf.agent.core.service import LoadBalancerMode, Service
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import GatewayAddress, NetworkAddress, Workload


@dataclass(frozen=True, slots=True)
class Waypoint:
    """A waypoint that was found: where it listens and whom it must prove to be."""

    address: SocketAddress
    workload: Workload
    expected: frozenset[SpiffeId]


def service_waypoint(service: Service, rng: random.Random) -> GatewayAddress | None:
    """The waypoint for one connection to `service`: drawn by weight where there are several."""
    if service.weighted_waypoints:
        sums = tuple(accumulate(each.weight for each in service.weighted_waypoints))
        if sums[-1] > 0:
            drawn = bisect_right(sums, int(rng.random() * sums[-1]))
            return service.weighted_waypoints[drawn].destination
    return service.waypoint


def find_waypoint(
    mesh: Snapshot,
    source: Workload,
    gateway: GatewayAddress,
    target: SocketAddress,
    rng: random.Random,
) -> Waypoint | Refused:
    """Where `gateway` is for a connection to `target`.

    A waypoint named by hostname is dialed in the client's address family, one
    named by address at that address.
    """
    named = lookup(mesh, source, gateway)
    wanted = target.ip
    if isinstance(gateway.destination, NetworkAddress):
        wanted = gateway.destination.ip
    service: Service | None = None
    port = gateway.hbone_mtls_port
    match named:
        case None:
            return _unusable(gateway, "is not in the mesh")
        case Workload() as workload:
            pass
        case Service() as service:
            balancing = service.load_balancing
            if balancing is not None and balancing.mode is LoadBalancerMode.PASSTHROUGH:
                return _unusable(gateway, "is a passthrough service")
            endpoint = pick_endpoint(mesh, source, service, port, rng, as_waypoint=True)
            if endpoint is None:
                return _unusable(gateway, f"has no usable endpoint for port {port}")
            workload = endpoint.workload
            found = target_port(endpoint, service, port)
            if found is None:
                return _unusable(gateway, f"does not say what port {port} is")
            port = found
    if workload.network != source.network:
        return _unusable(gateway, "is on another network")
    ip = select_ip(workload, wanted, service)
    if ip is None:
        return _unusable(gateway, "has no address of a usable family")
    return Waypoint(SocketAddress(ip, port), workload, expected_identities(workload, service))


def is_waypoint(mesh: Snapshot, source: Workload, gateway: GatewayAddress) -> bool:
    """Whether `source` itself is (one of the workloads behind) `gateway`."""
    named = lookup(mesh, source, gateway)
    match named:
        case None:
            return False
        case Workload():
            return named.uid == source.uid
        case Service():
            return any(e.workload.uid == source.uid for e in mesh.endpoints(named))


def lookup(mesh: Snapshot, source: Workload, gateway: GatewayAddress) -> Service | Workload | None:
    """What a gateway's reference names: services come first."""
    named = gateway.destination
    if isinstance(named, NetworkAddress):
        return mesh.service_at(named.network, named.ip, source.namespace) or mesh.workload_at(
            named.network, named.ip
        )
    return mesh.service(named.namespace, named.hostname) or mesh.workload_with_hostname(
        named.namespace, named.hostname
    )


def expected_identities(workload: Workload, service: Service | None) -> frozenset[SpiffeId]:
    """Whom the far side may prove to be: the workload, or what its service says."""
    if service is None or not service.subject_alt_names:
        return workload.identities
    return workload.identities.union(service.subject_alt_names)


def _unusable(gateway: GatewayAddress, why: str) -> Refused:
    return Refused(f"waypoint {gateway.destination} {why}", "no-waypoint")
