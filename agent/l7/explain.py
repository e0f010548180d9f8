"""What a waypoint would do with a request, told by what decides real ones.

The plan is compiled as the waypoint compiles it, from the same objects; rules
are matched and filters asked by the same code. Nothing is counted and nobody
is called: what an external authorizer would say is not known here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from meshbpf.agent.core.address import IPAddress, SocketAddress
from meshbpf.agent.core.balance import usable_endpoints
from meshbpf.agent.core.explain import Step
from meshbpf.agent.core.objects import ObjectSet
from meshbpf.agent.core.service import Service
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.waypoint import all_waypoints, named, service_waypoint
from meshbpf.agent.core.workload import GatewayAddress, Workload
from meshbpf.agent.l7.exchange import Caller, Connection, Destination, Exchange, Protocol
from meshbpf.agent.l7.filter import Chain, Reply
from meshbpf.agent.l7.message import RequestHead
from meshbpf.agent.l7.plan import PortPlan
from meshbpf.agent.l7.planner import Planner
from meshbpf.agent.l7.router import choose, decide


def explain_request(
    objects: ObjectSet,
    mesh: Snapshot,
    source: Workload,
    target: SocketAddress,
    head: RequestHead,
    rng: random.Random,
    cluster_domain: str = "cluster.local",
) -> list[Step]:
    """The steps at the waypoint; none when the connection goes through no waypoint."""
    if mesh.workload_at(source.network, target.ip) is not None:
        return []
    service = mesh.service_at(source.network, target.ip, source.namespace)
    gateway = None if service is None else service_waypoint(service, rng)
    if service is None or gateway is None:
        return []
    owner = named(mesh, source, gateway)
    if not isinstance(owner, Service):
        return [Step("waypoint", str(gateway.destination), "it has no Service to know it by")]
    steps = [Step("waypoint", f"{owner.namespace}/{owner.name}", f"{service} is bound to it")]
    planner = Planner(
        owner.namespace,
        owner.name,
        trust_domain=source.trust_domain,
        cluster_domain=cluster_domain,
    )
    plan = planner.plan(objects, mesh, lambda each: _bound(each, gateway))
    found = plan.services[service.key]
    connection = Connection(
        Caller(source.identity, SocketAddress(_ip(source, target), 0), source),
        Destination(target, target.port, service, None, target),
        Protocol.HTTP1,
    )
    exchange = Exchange(connection, head, Protocol.HTTP1, 0.0, 0.0)
    steps += _filters(found.chain, exchange)
    port = found.ports.get(target.port)
    if port is not None:
        steps += _route(port, exchange, mesh, source, rng)
    about = {service.name, service.namespace}
    steps += [
        Step("problem", str(each))
        for each in plan.problems
        if about & {each.key.namespace, each.key.name}
    ]
    return steps


def _filters(chain: Chain, exchange: Exchange) -> Iterator[Step]:
    for each in chain.filters:
        told = each.explain(exchange)
        if told:
            yield Step("filter", each.name or type(each).__name__, told)


def _route(
    port: PortPlan, exchange: Exchange, mesh: Snapshot, source: Workload, rng: random.Random
) -> Iterator[Step]:
    if port.protocol is Protocol.TCP:
        yield Step("rule", "none", "the port is declared opaque: no request is looked at")
        return
    namespace = exchange.caller.namespace
    routes = port.routes_for(namespace)
    whose = f"of its own namespace {namespace}" if namespace in port.consumers else "of the service"
    chosen = choose(routes, exchange)
    if chosen is None:
        yield Step("rule", "none: answered 404", f"no match of the routes {whose} holds")
        return
    if chosen.entry is None:
        yield Step("rule", "none", "no route is attached to this port: the service itself")
    else:
        yield Step("rule", chosen.rule.name, f"matches {chosen.entry.match} (routes {whose})")
    for extension in chosen.rule.filters.extensions:
        yield Step("filter", extension.name, extension.explain(exchange))
    answer = decide(chosen, exchange, rng)
    if isinstance(answer, Reply):
        headers = ", ".join(f"{name}: {value}" for name, value in answer.headers)
        yield Step("answer", str(answer.status), headers or answer.detail)
        return
    backend = answer.backend
    service = mesh.service(backend.service.namespace, backend.service.hostname)
    count = 0 if service is None else len(usable_endpoints(mesh, source, service, backend.port))
    shares = chosen.rule.backends.every
    drawn = ""
    if len(shares) > 1:
        drawn = f", drawn with weight {backend.weight} of {sum(each.weight for each in shares)}"
    request = exchange.request
    yield Step(
        "backend",
        f"{backend}{drawn}",
        f"{count} usable endpoints; asks {request.method} {request.authority}{request.path}",
    )


def _bound(service: Service, gateway: GatewayAddress) -> bool:
    return any(each.destination == gateway.destination for each in all_waypoints(service))


def _ip(source: Workload, target: SocketAddress) -> IPAddress:
    """What the waypoint would see as the caller's address."""
    same = [ip for ip in source.addresses if ip.version == target.ip.version]
    return (same or source.addresses or (target.ip,))[0]
