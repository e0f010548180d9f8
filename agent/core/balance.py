"""Which endpoint of a service takes a connection.

Endpoints that cannot serve the port or cannot be reached are out; locality
narrows the rest as the service asks; of those a random one is taken, weighted
by capacity. There are no retries, and no endpoint is ejected for failing; a
waypoint does both, with the same endpoints (l7/balancer.py).

The narrowing is the same for every connection of one source workload's place,
so it is kept with the endpoints; a pick is then one random number and a bisection.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import accumulate

from meshbpf.agent.core.service import (
    Endpoint,
    LoadBalancerMode,
    LoadBalancerScope,
    LoadBalancing,
    Service,
)
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import Workload

_NO_PREFERENCE = LoadBalancing()


class Purpose(Enum):
    """What an endpoint is wanted for."""

    APP = auto()
    WAYPOINT = auto()
    """May take a port that its service does not list, when it has an application tunnel."""
    GATEWAY = auto()
    """Is dialed across networks: it is where one network can be reached from the others."""


# Ports times places of local pods, for one service; past this the memo starts
# over, since a scan over many ports must not grow memory.
_MEMO_LIMIT = 1024


@dataclass(frozen=True, slots=True)
class _Candidates:
    endpoints: tuple[Endpoint, ...]
    cumulative: tuple[int, ...]  # running sum of capacities

    def pick(self, rng: random.Random) -> Endpoint | None:
        total = self.cumulative[-1] if self.cumulative else 0
        if total == 0:
            return None
        return self.endpoints[bisect_right(self.cumulative, int(rng.random() * total))]


def pick_endpoint(
    mesh: Snapshot,
    source: Workload,
    service: Service,
    port: int,
    rng: random.Random,
    *,
    purpose: Purpose = Purpose.APP,
    spared: frozenset[str] = frozenset(),
) -> Endpoint | None:
    """An endpoint of `service` for its `port`, or None when none will do.

    Workloads of `spared`, by uid, are not taken while there are others: somebody
    has drawn for them already.
    """
    if spared:
        found = _candidates(mesh, source, service, port, purpose, spared).pick(rng)
        if found is not None:
            return found
    return _candidates(mesh, source, service, port, purpose).pick(rng)


def usable_endpoints(
    mesh: Snapshot, source: Workload, service: Service, port: int
) -> tuple[Endpoint, ...]:
    """Those among which `pick_endpoint` draws, for whoever balances by load."""
    return _candidates(mesh, source, service, port, Purpose.APP).endpoints


def _candidates(
    mesh: Snapshot,
    source: Workload,
    service: Service,
    port: int,
    purpose: Purpose,
    spared: frozenset[str] = frozenset(),
) -> _Candidates:
    balancing = service.load_balancing or _NO_PREFERENCE
    place = (
        (source.network, source.locality, source.node, source.cluster_id)
        if balancing.routing_preference
        else (source.network,)
    )
    key = ("balance", port, purpose, place, spared)
    endpoints = mesh.endpoints(service)
    memo = endpoints.memo
    candidates: _Candidates | None = memo.get(key)
    if candidates is None:
        if len(memo) >= _MEMO_LIMIT:
            memo.clear()
        usable = [
            endpoint
            for endpoint in endpoints
            if _reachable(endpoint.workload, source, purpose)
            and _serves(endpoint, service, port, purpose)
        ]
        chosen = _narrow(balancing, source, usable)
        if spared:  # of those that were drawn from: narrowing again could find others
            chosen = [endpoint for endpoint in chosen if endpoint.workload.uid not in spared]
        candidates = _Candidates(
            tuple(chosen), tuple(accumulate(e.workload.capacity for e in chosen))
        )
        memo[key] = candidates
    return candidates


def target_port(endpoint: Endpoint, service: Service, port: int) -> int | None:
    """What the service's `port` is at this endpoint: its own mapping, then the service's."""
    target = endpoint.ports.get(port) or service.ports.get(port)
    if target:
        return target
    tunnel = endpoint.workload.application_tunnel
    return port if tunnel is not None and tunnel.port is not None else None


def _reachable(workload: Workload, source: Workload, purpose: Purpose) -> bool:
    if workload.network != source.network and purpose is not Purpose.GATEWAY:
        return workload.network_gateway is not None
    return bool(workload.addresses or workload.hostname)


def _serves(endpoint: Endpoint, service: Service, port: int, purpose: Purpose) -> bool:
    target = service.ports.get(port)
    if purpose is Purpose.WAYPOINT:
        return target is not None or endpoint.workload.application_tunnel is not None
    # Target 0 is a named port: each endpoint says what it means there.
    return target is not None and (target != 0 or port in endpoint.ports)


def _narrow(
    balancing: LoadBalancing, source: Workload, endpoints: Sequence[Endpoint]
) -> Sequence[Endpoint]:
    scopes = balancing.routing_preference
    if balancing.mode is LoadBalancerMode.UNSPECIFIED or not endpoints:
        return endpoints
    ranks = [_rank(scopes, source, endpoint.workload) for endpoint in endpoints]
    if balancing.mode is LoadBalancerMode.STRICT:
        # An endpoint of another network skips the preferred NETWORK scope, so
        # it never reaches the full count: strict stays within the network.
        kept = [(r, e) for r, e in zip(ranks, endpoints, strict=True) if r[0] == len(scopes)]
    else:
        kept = list(zip(ranks, endpoints, strict=True))
    if not kept:
        return ()
    best = max(sum(rank) for rank, _ in kept)
    return [endpoint for rank, endpoint in kept if sum(rank) == best]


def _rank(
    scopes: Sequence[LoadBalancerScope], source: Workload, workload: Workload
) -> tuple[int, int]:
    """(how many scopes match in a row, extra weight of a preferred network).

    NETWORK as the first scope is a preference: another network's endpoint is
    still compared by the other scopes, and one of our own outranks them all.
    """
    matched = extra = 0
    for scope in scopes:
        if scope is LoadBalancerScope.NETWORK and scopes[0] is LoadBalancerScope.NETWORK:
            if source.network != workload.network:
                continue
            extra = len(scopes) - 1
        elif not _matches(scope, source, workload):
            break
        matched += 1
    return matched, extra


def _matches(scope: LoadBalancerScope, source: Workload, workload: Workload) -> bool:
    match scope:
        case LoadBalancerScope.REGION:
            return source.locality.region == workload.locality.region
        case LoadBalancerScope.ZONE:
            return source.locality.zone == workload.locality.zone
        case LoadBalancerScope.SUBZONE:
            return source.locality.subzone == workload.locality.subzone
        case LoadBalancerScope.NODE:
            return source.node == workload.node
        case LoadBalancerScope.CLUSTER:
            return source.cluster_id == workload.cluster_id
        case LoadBalancerScope.NETWORK:
            return source.network == workload.network
