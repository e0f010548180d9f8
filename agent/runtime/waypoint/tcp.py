"""Opaque connections: judged once, sent to a backend by weight, then left alone."""

from __future__ import annotations

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.route import Refused
from meshbpf.agent.l7.balancer import Choice, pod_choice
from meshbpf.agent.l7.exchange import Connection, Flag
from meshbpf.agent.l7.filter import Chain, Reply
from meshbpf.agent.l7.plan import PortPlan
from meshbpf.agent.l7.rules import Backend, Shares
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.runtime.waypoint.body import BodySource
from meshbpf.agent.runtime.waypoint.channel import BrokenError, Channel
from meshbpf.agent.runtime.waypoint.opaque import join
from meshbpf.agent.runtime.waypoint.proxy import Proxy
from meshbpf.agent.runtime.waypoint.run_filters import run_hook

log = Log("waypoint")

_TRIES = 3
"""No byte has been sent before a connection stands, so another endpoint may be tried."""


async def serve_tcp(
    proxy: Proxy,
    connection: Connection,
    chain: Chain,
    port: PortPlan,
    client: Channel,
    received: bytes,
) -> None:
    """Carry one connection to its end; the client's side is closed in any case."""
    try:
        for hook in chain.connect:
            outcome = await run_hook(
                hook, connection, BodySource(_nothing, has_body=False), proxy.calls
            )
            if isinstance(outcome, Reply):
                log.info(
                    "connection refused",
                    source=connection.caller.address,
                    destination=connection.destination.authority,
                    cause=outcome.detail,
                )
                return
        reached = await _connect(proxy, connection, port)
        if isinstance(reached, Flag):
            # As Envoy counts it: a connection that was closed at once.
            series = proxy.tcp.series(connection, None, None, (reached,))
            series.opened += 1
            series.closed += 1
            return
        endpoint, choice = reached
        series = proxy.tcp.series(connection, choice.workload, choice.service)
        series.opened += 1

        def count(from_client: int, to_client: int) -> None:
            series.received_bytes += from_client
            series.sent_bytes += to_client

        try:
            await join(client, endpoint, count, to_other=received)
        finally:
            series.closed += 1
    except BrokenError as error:
        log.debug("connection broke", cause=error, destination=connection.destination.authority)
    finally:
        client.close()


async def _nothing() -> bytes:
    """An opaque connection has no body that a filter could ask for."""
    return b""


async def _connect(
    proxy: Proxy, connection: Connection, port: PortPlan
) -> tuple[Channel, Choice] | Flag:
    """A connection to an endpoint, or why there is none."""
    state = proxy.state
    backend = _backend(proxy, connection, port)
    tried: list[str] = []
    for _ in range(_TRIES):
        choice = _choice(proxy, connection, backend, tried)
        if isinstance(choice, Refused):
            log.info(
                "no endpoint", destination=connection.destination.authority, cause=choice.reason
            )
            return Flag.NO_HEALTHY_UPSTREAM
        proxy.balancer.began(choice)
        try:
            channel = await proxy.pools.open(state.own, choice)
        except (MeshbpfError, OSError) as error:
            proxy.balancer.ended(choice, proxy.clock(), failed=True)
            log.info("no connection to the endpoint", endpoint=choice.route.target, cause=error)
            if choice.workload.uid in tried:
                break
            tried.append(choice.workload.uid)
            continue
        proxy.balancer.ended(choice, proxy.clock(), failed=False)
        return channel, choice
    return Flag.UPSTREAM_FAILURE


def _backend(proxy: Proxy, connection: Connection, port: PortPlan) -> Backend | None:
    """By the TCPRoute that holds for this client, else the service itself. None: refuse."""
    destination = connection.destination
    if destination.service is None:
        return None
    rule = port.routes_for(connection.caller.namespace).tcp
    own = Shares((Backend(destination.service.key, destination.port),))
    drawn = (own if rule is None else rule.backends).draw(proxy.rng)
    return None if drawn is None or drawn.invalid else drawn


def _choice(
    proxy: Proxy, connection: Connection, backend: Backend | None, tried: list[str]
) -> Choice | Refused:
    state, destination = proxy.state, connection.destination
    if destination.service is None:
        return pod_choice(state.mesh, state.own, connection, proxy.rng)
    if backend is None:
        return Refused("the route has no usable backend", "no-backend")
    service = state.mesh.service(backend.service.namespace, backend.service.hostname)
    if service is None:
        return Refused(f"there is no service {backend.service}", "no-service")
    return proxy.balancer.pick(
        state.mesh, state.own, service, backend.port, proxy.clock(), tried=tried
    )
