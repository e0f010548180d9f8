"""Whether the kernel may carry a connection, and what that answer depends on.

Pure, and nothing new is decided here: the kernel may carry what outbound
routing would tunnel straight to the very pod that was dialed, inbound routing
would hand to that pod's app, and policy allows. All three are asked, with the
facts that the agent would have.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from meshbpf.agent.core.address import IPAddress, SocketAddress
from meshbpf.agent.core.admission import admission
from meshbpf.agent.core.authz import ConnectionFacts, Decision
from meshbpf.agent.core.balance import target_port, usable_endpoints
from meshbpf.agent.core.route import INTERNAL_PORTS, NO_NAMES, HboneRoute, InboundRoute, Lookup
from meshbpf.agent.core.routing import inbound_hbone, inbound_plain, outbound, to_endpoint
from meshbpf.agent.core.service import LoadBalancerMode, Service
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import Workload

# Never drawn from: where there is a choice the answer is no.
_NO_CHOICE: Final = random.Random(0)  # noqa: S311


def between_pods(
    mesh: Snapshot,
    source: Workload,
    source_ip: IPAddress,
    destination: Workload,
    own: Collection[IPAddress],
    target: SocketAddress,
) -> Decision:
    """May `source` reach `target`, an address of the pod of `destination`, without the agent?

    `own` are the addresses that the destination's pod really has. A dry-run
    policy that has something to say makes the answer no: it is told by whoever
    carries the connection, once for each.
    """
    if destination.waypoint is not None:
        return _no(f"{destination} has a waypoint")
    if mesh.service_at(destination.network, target.ip, None) is not None:
        return _no(f"{target.ip} is a service's address as well")
    if source_ip not in source.addresses:
        return _no(f"{source_ip} is not an address of {source} in the mesh state")
    route = outbound(mesh, source, target, rng=_NO_CHOICE)
    if not isinstance(route, HboneRoute):
        return _no(f"{target} is not in the mesh, or is refused")
    if route.destination.uid != destination.uid or route.target != target:
        return _no(f"{target} is reached through {route.destination}")
    direct = route.gateway.ip == target.ip and route.inner is None
    if not direct or destination.identity not in route.expected:
        return _no(f"{target} is not reached directly")
    inbound = inbound_hbone(mesh, destination, own, str(target), arrived_at=target.ip)
    if not isinstance(inbound, InboundRoute) or inbound.target != target or inbound.proxied:
        return _no(f"{destination} does not take {target}")
    facts = ConnectionFacts(source.identity, source_ip, target.ip, target.port)
    return _without_rehearsal(admission(mesh, destination).decide(facts))


@dataclass(frozen=True, slots=True)
class NearEndpoint:
    """An endpoint at an address of this node, and its part of all weights."""

    workload: Workload
    target: SocketAddress
    weight: int


@dataclass(frozen=True, slots=True)
class Draw:
    """What a connection to a service is drawn from, where nothing but an endpoint is to decide."""

    service: Service
    near: tuple[NearEndpoint, ...]
    total: int
    """Weight of all endpoints, near and far."""


def draw_of(
    mesh: Snapshot, source: Workload, target: SocketAddress, near: Collection[IPAddress]
) -> Draw | None:
    """What `source` may get that dials a service at `target`; None where routing has more to say.

    `near` are the addresses of this node's pods. Whether the kernel may carry to
    one of them is `between_pods` to say.
    """
    service = mesh.service_at(source.network, target.ip, source.namespace)
    if service is None or mesh.workload_at(source.network, target.ip) is not None:
        return None
    if service.waypoint is not None or service.weighted_waypoints:
        return None
    balancing = service.load_balancing
    if balancing is not None and balancing.mode is LoadBalancerMode.PASSTHROUGH:
        return None
    endpoints = usable_endpoints(mesh, source, service, target.port)
    lookup = Lookup(NO_NAMES, _NO_CHOICE)
    found = []
    for endpoint in endpoints:
        workload = endpoint.workload
        port = target_port(endpoint, service, target.port)
        if port is None or workload.network != source.network or workload.capacity == 0:
            continue
        if all(ip not in near for ip in workload.addresses):
            continue
        route = to_endpoint(workload, service, target.ip, port, INTERNAL_PORTS, lookup)
        if not isinstance(route, HboneRoute) or route.target.ip.version != target.ip.version:
            continue
        if route.target.ip in near and workload.identity in route.expected:
            found.append(NearEndpoint(workload, route.target, workload.capacity))
    return Draw(service, tuple(found), sum(each.workload.capacity for each in endpoints))


def still_allowed(
    mesh: Snapshot,
    source: Workload | None,
    source_ip: IPAddress,
    destination: Workload,
    target: SocketAddress,
) -> Decision:
    """Whether policy lets an established connection live; `source` is None for plaintext.

    Routing is not asked again: as with connections that the agent carries, a
    way that new ones would not take is no reason to cut this one.
    """
    identity = None if source is None else source.identity
    facts = ConnectionFacts(identity, source_ip, target.ip, target.port)
    return admission(mesh, destination).decide(facts)


def plaintext(mesh: Snapshot, destination: Workload, facts: ConnectionFacts) -> Decision:
    """May a plaintext connection to the pod of `destination` go to its app without the agent?"""
    if facts.source_identity is not None:
        return _no("plaintext proves no identity")
    target = SocketAddress(facts.destination_ip, facts.destination_port)
    inbound = inbound_plain(mesh, destination, target)
    if not isinstance(inbound, InboundRoute) or inbound.target != target or inbound.proxied:
        return _no(f"{destination} does not take {target}")
    return _without_rehearsal(admission(mesh, destination).decide(facts))


def footprint(
    mesh: Snapshot, workload: Workload | None, addresses: Collection[IPAddress]
) -> tuple[object, ...]:
    """All that the answers about one pod depend on: unequal footprints, other answers.

    `addresses` are the pod's own. Services are in it for what the answers are
    counted under.
    """
    if workload is None:
        return ()
    found = (mesh.service(key.namespace, key.hostname) for key in workload.services)
    services = tuple(
        (each.namespace, each.hostname, each.name, tuple(each.ports.items()))
        for each in found
        if each is not None
    )
    places = tuple(
        (
            mesh.workload_at(workload.network, ip),
            mesh.service_at(workload.network, ip, None) is None,
        )
        for ip in sorted(addresses, key=lambda ip: (ip.version, int(ip)))
    )
    rules = admission(mesh, workload)
    return (workload, rules.policies, rules.only_from, places, services)


def _no(reason: str) -> Decision:
    return Decision(False, None, reason)


def _without_rehearsal(decision: Decision) -> Decision:
    if decision.allowed and decision.dry_run:
        return _no("a dry-run policy has something to tell")
    return decision
