"""Which endpoint of a backend answers a request: the less loaded of two.

Locality narrows the endpoints first, as for every connection of the mesh
(core/balance.py). Of the rest two are drawn and the one with fewer requests
in flight is taken (for its capacity): nearly as good as looking at all, and
it cannot send a herd to one that just became free.

An endpoint that fails FAILURES times in a row is left out for a while, longer
each time (Envoy's passive outlier detection). Never more than half of them:
if most fail, the fault is not theirs, and an empty list helps nobody.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from hashlib import blake2b

from meshbpf.agent.core.address import IPAddress
from meshbpf.agent.core.balance import target_port, usable_endpoints
from meshbpf.agent.core.route import (
    INTERNAL_PORTS,
    NO_NAMES,
    HboneRoute,
    Lookup,
    PlainRoute,
    Refused,
)
from meshbpf.agent.core.routing import to_endpoint
from meshbpf.agent.core.service import Endpoint, LoadBalancerMode, Service
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import Workload
from meshbpf.agent.l7.exchange import Connection

FAILURES = 5  # Envoy's consecutive_gateway_failure
EJECTION_S = 30.0  # Envoy's base_ejection_time
EJECTION_LIMIT_S = 300.0  # Envoy's max_ejection_time
EJECTED_SHARE = 0.5


class Load:
    """What is known of one endpoint at one port."""

    __slots__ = ("active", "ejected_until_s", "ejections", "failures")

    def __init__(self) -> None:
        self.active = 0
        """Requests in flight."""
        self.failures = 0
        """In a row."""
        self.ejections = 0
        self.ejected_until_s = 0.0


@dataclass(frozen=True, slots=True)
class Choice:
    """An endpoint and the way to it."""

    route: HboneRoute | PlainRoute
    workload: Workload
    service: Service | None
    load: Load


class Balancer:
    """Picks endpoints and remembers how they do."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._loads: dict[tuple[str, int], Load] = {}

    def pick(
        self,
        mesh: Snapshot,
        own: Workload,
        service: Service,
        port: int,
        now_s: float,
        *,
        tried: Collection[str] = (),
        session: str = "",
    ) -> Choice | Refused:
        """An endpoint for one request.

        `tried` holds the uids that a retry should avoid, if there are others;
        `session` is what `session_of` said of the endpoint that is wanted.
        """
        balancing = service.load_balancing
        if balancing is not None and balancing.mode is LoadBalancerMode.PASSTHROUGH:
            return Refused(f"{service} is a passthrough service", "no-endpoint")
        found = usable_endpoints(mesh, own, service, port)
        if not found:
            return Refused(f"{service} has no usable endpoint for port {port}", "no-endpoint")
        endpoint = None
        if session and not tried:
            endpoint = next((e for e in found if session_of(e.workload) == session), None)
        if endpoint is None:
            endpoint = self._less_loaded(self._healthy(found, port, now_s), port, tried)
        return self._choice(endpoint, service, port, own)

    def began(self, choice: Choice) -> None:
        """A request is on its way there."""
        choice.load.active += 1

    def ended(self, choice: Choice, now_s: float, *, failed: bool) -> None:
        """It is over. `failed`: no connection, no answer, or 502, 503, 504."""
        load = choice.load
        load.active -= 1
        if not failed:
            load.failures = 0
            if load.ejections and now_s - load.ejected_until_s > EJECTION_LIMIT_S:
                load.ejections = 0
            return
        load.failures += 1
        if load.failures >= FAILURES:
            load.failures = 0
            load.ejections += 1
            load.ejected_until_s = now_s + min(EJECTION_S * load.ejections, EJECTION_LIMIT_S)

    def ejected(self, now_s: float) -> int:
        """How many endpoints are left out now."""
        return sum(load.ejected_until_s > now_s for load in self._loads.values())

    def keep_only(self, mesh: Snapshot) -> None:
        """Forget endpoints that are gone: what is known of them would pile up."""
        gone = [key for key in self._loads if mesh.workload(key[0]) is None]
        for key in gone:
            del self._loads[key]

    def _load(self, endpoint: Endpoint, port: int) -> Load:
        key = (endpoint.workload.uid, port)
        load = self._loads.get(key)
        if load is None:
            load = self._loads[key] = Load()
        return load

    def _healthy(
        self, found: tuple[Endpoint, ...], port: int, now_s: float
    ) -> tuple[Endpoint, ...]:
        if len(found) == 1:
            return found
        out = [e for e in found if self._load(e, port).ejected_until_s > now_s]
        if not out or len(out) > EJECTED_SHARE * len(found):
            return found
        return tuple(e for e in found if e not in out)

    def _less_loaded(
        self, found: tuple[Endpoint, ...], port: int, tried: Collection[str]
    ) -> Endpoint:
        if tried:
            found = tuple(e for e in found if e.workload.uid not in tried) or found
        if len(found) == 1:
            return found[0]
        first, second = self._rng.sample(found, 2)
        # Drawn evenly, weighed by capacity: in flight per unit of it.
        one = (self._load(first, port).active + 1) / max(first.workload.capacity, 1)
        two = (self._load(second, port).active + 1) / max(second.workload.capacity, 1)
        return first if one <= two else second

    def _choice(
        self, endpoint: Endpoint, service: Service, port: int, own: Workload
    ) -> Choice | Refused:
        target = target_port(endpoint, service, port)
        workload = endpoint.workload
        if target is None:
            return Refused(f"{service} does not say what port {port} is", "unknown-port")
        if workload.network != own.network:
            return Refused(f"{workload} is on network {workload.network!r}", "other-network")
        if not workload.addresses:
            what = f"{workload} is known by its name {workload.hostname!r} alone"
            return Refused(f"{what}, which a waypoint does not look up", "no-address")
        lookup = Lookup(NO_NAMES, self._rng)
        wanted = _family_of(own, workload)
        route = to_endpoint(workload, service, wanted, target, INTERNAL_PORTS, lookup)
        if isinstance(route, Refused):
            return route
        return Choice(route, workload, service, self._load(endpoint, port))


def pod_choice(
    mesh: Snapshot, own: Workload, connection: Connection, rng: random.Random
) -> Choice | Refused:
    """A pod that was addressed itself is the only endpoint there is."""
    address = connection.destination.address
    if address is None:
        return Refused("no address was asked for", "no-address")
    workload = mesh.workload_at(own.network, address.ip)
    if workload is None:
        return Refused(f"{address} has left the mesh", "unknown-workload")
    lookup = Lookup(NO_NAMES, rng)
    route = to_endpoint(workload, None, address.ip, address.port, INTERNAL_PORTS, lookup)
    return route if isinstance(route, Refused) else Choice(route, workload, None, Load())


def session_of(workload: Workload) -> str:
    """What stands for an endpoint in a session: nothing that a client could learn from."""
    return blake2b(workload.uid.encode(), digest_size=12).hexdigest()


def _family_of(own: Workload, workload: Workload) -> IPAddress:
    """The address whose family decides which one of the workload's is dialed."""
    return (own.addresses or workload.addresses)[0]
