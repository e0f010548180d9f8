"""Why a connection goes where it goes, told by the functions that decide it.

Nothing is decided here: each step calls what the agent calls for a real
connection (names, routing, policy) on the same snapshot, and says what the
answer was and why. Where chance picks (an endpoint, a weighted waypoint) one
draw is shown, and among how many.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from meshbpf.agent.core.address import AddressError, SocketAddress, parse_ip
from meshbpf.agent.core.admission import admission
from meshbpf.agent.core.authz import ConnectionFacts
from meshbpf.agent.core.balance import usable_endpoints
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.names import RecordType, host
from meshbpf.agent.core.route import HboneRoute, PlainRoute, Refused
from meshbpf.agent.core.routing import inbound_plain, outbound
from meshbpf.agent.core.service import Service
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import TunnelProtocol, Workload


class Outcome(StrEnum):
    """How it ends."""

    KERNEL = "kernel"  # carried by the kernel between two pods of this node
    HBONE = "hbone"
    PLAINTEXT = "plaintext"
    REFUSED = "refused"  # no way leads there
    DENIED = "denied"  # policy says no


@dataclass(frozen=True, slots=True)
class Step:
    """One decision: which, its answer, and why it is that."""

    stage: str
    what: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """What was asked for, as an address that a client would dial."""

    address: SocketAddress
    step: Step


def workload_of(mesh: Snapshot, text: str, network: str) -> Workload:
    """A workload by NS/NAME or address; MeshbpfError when there is none, or several."""
    namespace, slash, name = text.partition("/")
    if slash:
        found = mesh.workload_named(namespace, name)
        if len(found) == 1:
            return found[0]
        if found:
            places = ", ".join(str(one.addresses[0]) for one in found if one.addresses)
            raise MeshbpfError(
                "ambiguous", f"{text} is several workloads: {places}", "give one's IP"
            )
    else:
        try:
            at = mesh.workload_at(network, parse_ip(text))
        except AddressError:
            at = None
        if at is not None:
            return at
    raise MeshbpfError(
        "unknown-workload",
        f"the mesh state has no workload {text}",
        "`meshbpf workloads` lists them; write NS/NAME or an IP address",
    )


def target_of(mesh: Snapshot, source: Workload, text: str, domain: str) -> Target:
    """What `source` means by `IP[:PORT]`, `NS/NAME[:PORT]` (a pod) or `HOST[:PORT]`."""
    name, port = _split(text)
    if "/" in name:
        pod = workload_of(mesh, name, source.network)
        if not pod.addresses:
            raise MeshbpfError("no-address", f"{name} has no address of its own", "use its service")
        address = pod.addresses[0]
        step = Step("destination", f"pod {name} is {address}", f"workload {pod.uid}")
        return Target(SocketAddress(address, _port(port, None, text)), step)
    try:
        address = parse_ip(name)
    except AddressError:
        return _by_name(mesh, source, name, port, domain)
    service = mesh.service_at(source.network, address, source.namespace)
    known = service or mesh.workload_at(source.network, address)
    what = f"{address} is {_called(known)}" if known else f"{address} is not in the mesh"
    return Target(SocketAddress(address, _port(port, service, text)), Step("destination", what))


def explain(
    mesh: Snapshot, source: Workload, target: SocketAddress, rng: random.Random
) -> tuple[Outcome, tuple[Step, ...]]:
    """The steps of a connection that `source` opens to `target`, and how it ends."""
    route = outbound(mesh, source, target, rng=rng)
    steps = list(_picking(mesh, source, target, route))
    if isinstance(route, Refused):
        return Outcome.REFUSED, (*steps, Step("route", f"refused: {route.code}", route.reason))
    if isinstance(route, PlainRoute):
        return _plain(mesh, source, route, steps)
    steps.append(Step("route", f"HBONE to {route.gateway}", _why_tunnel(route, target)))
    expected = ", ".join(sorted(map(str, route.expected)))
    steps.append(Step("tunnel", f"asks for {route.authority}", f"the peer must prove {expected}"))
    if route.inner is not None:
        inner = ", ".join(sorted(map(str, route.inner)))
        steps.append(Step("tunnel", "and in it a second one", f"whose end must prove {inner}"))
        steps.append(Step("policy", "the other network's", "this node does not know it"))
        return Outcome.HBONE, tuple(steps)
    if _is_waypoint(route, target):
        steps.append(Step("policy", "the waypoint's", "it judges the request; see its own explain"))
        return Outcome.HBONE, tuple(steps)
    allowed, step = _policy(mesh, source, route.destination, route.target, identified=True)
    return Outcome.HBONE if allowed else Outcome.DENIED, (*steps, *step)


def _plain(
    mesh: Snapshot, source: Workload, route: PlainRoute, steps: list[Step]
) -> tuple[Outcome, tuple[Step, ...]]:
    destination = route.destination
    if destination is None:
        why = "the service passes connections through" if route.service else "not in the mesh"
        return Outcome.PLAINTEXT, (*steps, Step("route", f"plaintext to {route.target}", why))
    why = f"{destination} does not speak HBONE"
    steps.append(Step("route", f"plaintext to {route.target}", why))
    inbound = inbound_plain(mesh, destination, route.target)
    if isinstance(inbound, Refused):
        return Outcome.REFUSED, (*steps, Step("inbound", inbound.code, inbound.reason))
    return Outcome.PLAINTEXT, tuple(steps)


def _picking(
    mesh: Snapshot, source: Workload, target: SocketAddress, route: object
) -> Iterator[Step]:
    service = mesh.service_at(source.network, target.ip, source.namespace)
    if service is None:
        return
    waypoint = service.waypoint is not None or bool(service.weighted_waypoints)
    if waypoint and isinstance(route, HboneRoute) and _is_waypoint(route, target):
        yield Step("service", _called(service), f"through its waypoint {route.destination}")
        return
    usable = usable_endpoints(mesh, source, service, target.port)
    picked = getattr(route, "destination", None)
    why = f"one of {len(usable)} usable endpoints" if picked else "no endpoint"
    yield Step("service", f"{_called(service)} port {target.port}", f"{picked or 'none'}: {why}")


def _policy(
    mesh: Snapshot,
    source: Workload,
    destination: Workload,
    target: SocketAddress,
    *,
    identified: bool,
) -> tuple[bool, list[Step]]:
    address = next((ip for ip in source.addresses if ip.version == target.ip.version), None)
    if address is None:
        address = source.addresses[0] if source.addresses else target.ip
    facts = ConnectionFacts(
        source.identity if identified else None, address, target.ip, target.port
    )
    rules = admission(mesh, destination)
    policies, decision = rules.policies, rules.decide(facts)
    answer = "allowed" if decision.allowed else "denied"
    names = ", ".join(policy.key for policy in policies) or "none"
    steps = [Step("policy", answer, f"{decision.reason} (policies of {destination}: {names})")]
    steps += [Step("policy", "dry run", line) for line in decision.dry_run]
    return decision.allowed, steps


def _why_tunnel(route: HboneRoute, target: SocketAddress) -> str:
    if route.inner is not None:
        return f"{route.destination} is on another network, whose gateway this is"
    if _is_waypoint(route, target):
        return f"{target} is bound to the waypoint {route.destination}"
    return f"{route.destination} speaks HBONE"


def _is_waypoint(route: HboneRoute, target: SocketAddress) -> bool:
    """A tunnel to an endpoint asks for that endpoint's own address; one to a waypoint does not."""
    return route.target.ip not in route.destination.addresses and route.inner is None


def _by_name(mesh: Snapshot, source: Workload, name: str, port: int | None, domain: str) -> Target:
    for kind in (RecordType.A, RecordType.AAAA):
        found = host(mesh, source, name.lower().rstrip("."), kind, domain=domain)
        if found is not None and found.addresses:
            address = found.addresses[0]
            service = mesh.service_at(source.network, address, source.namespace)
            known = service or mesh.workload_at(source.network, address)
            step = Step("destination", f"{name} is {address}", f"{_called(known)}, by DNS")
            return Target(SocketAddress(address, _port(port, service, name)), step)
    raise MeshbpfError(
        "unknown-host",
        f"the mesh knows no address for {name}, seen from {source.namespace}",
        "the pod asks its own resolver for it: give the address that it gets",
    )


def _port(port: int | None, service: Service | None, text: str) -> int:
    if port is not None:
        return port
    if service is not None and len(service.ports) == 1:
        return next(iter(service.ports))
    has = f"; {service} has {', '.join(map(str, sorted(service.ports)))}" if service else ""
    raise MeshbpfError("no-port", f"which port of {text}?{has}", f"write {text}:PORT")


def _split(text: str) -> tuple[str, int | None]:
    if text.startswith("["):
        name, _, rest = text[1:].partition("]")
        return name, _number(rest[1:], text) if rest.startswith(":") else None
    if text.count(":") > 1:
        return text, None  # IPv6 without brackets
    name, colon, port = text.partition(":")
    return name, _number(port, text) if colon else None


def _number(port: str, text: str) -> int:
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise MeshbpfError("bad-port", f"{port!r} in {text!r} is no port", "write 1 to 65535")
    return int(port)


def _called(known: Service | Workload | None) -> str:
    if isinstance(known, Service):
        return f"service {known}"
    if known is None:
        return "an address outside the mesh"
    protocol = "HBONE" if known.tunnel_protocol is TunnelProtocol.HBONE else "TCP"
    return f"pod {known.namespace}/{known.name} ({protocol})"
