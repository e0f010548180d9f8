"""The plans of all waypoints of a cluster, for what they say of its objects.

A controller makes the same plans that the waypoints make for themselves, and
tells from them which services are bound, which routes and policies are in
force, and what is wrong with those that are not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from meshbpf.agent.core.objects import KubeObject, ObjectKey, ObjectSet
from meshbpf.agent.core.service import Service
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.waypoint import all_waypoints
from meshbpf.agent.core.workload import NamespacedHostname, NetworkAddress
from meshbpf.agent.l7.deployment import CLASS, Template, is_ours
from meshbpf.agent.l7.kinds import KINDS
from meshbpf.agent.l7.planner import ROUTE_KINDS, Planner
from meshbpf.agent.l7.problem import Problem
from meshbpf.agent.l7.references import GATEWAY_API
from meshbpf.agent.l7.sources import kind_of
from meshbpf.agent.l7.status import (
    Deployed,
    class_status,
    gateway_status,
    policy_status,
    route_status,
)

_AUTHORIZATION = ("security.istio.io", "AuthorizationPolicy")
POLICY_KINDS = (
    _AUTHORIZATION,
    *((group, kind) for group, _version, kind in KINDS if group != GATEWAY_API),
)
"""What is attached by targetRefs, and has a status: (group, kind)."""

GatewayName = tuple[str, str]
"""Namespace and name."""


@dataclass(frozen=True, slots=True)
class Oversight:
    """What the plans of one moment say."""

    bound: frozenset[tuple[str, str, str]]
    """Services and ServiceEntries (kind, namespace, name) with a waypoint of ours."""
    problems: Mapping[ObjectKey, tuple[Problem, ...]]


class Overseer:
    """Makes the plans, one after the other: what was good stays known."""

    def __init__(self, template: Template) -> None:
        self._template = template
        self._planners: dict[GatewayName, Planner] = {}

    def look(self, objects: ObjectSet, mesh: Snapshot) -> Oversight:
        """Plan for every Gateway of our class."""
        gateways = list(gateways_of(objects))
        names = set(map(name_of, gateways))
        self._planners = {name: each for name, each in self._planners.items() if name in names}
        bound: set[tuple[str, str, str]] = set()
        problems: defaultdict[ObjectKey, dict[Problem, None]] = defaultdict(dict)
        for gateway in gateways:
            own = _destinations(mesh, self._template.cluster.service_key(*name_of(gateway)))
            plan = self._planner(gateway).plan(objects, mesh, partial(_is_bound, own))
            services = [each.service for each in plan.services.values()]
            bound |= {(kind_of(each), each.namespace, each.name) for each in services}
            for problem in plan.problems:
                problems[problem.key][problem] = None
        return Oversight(frozenset(bound), {key: tuple(found) for key, found in problems.items()})

    def _planner(self, gateway: KubeObject) -> Planner:
        name = name_of(gateway)
        if name not in self._planners:
            self._planners[name] = Planner(
                *name,
                trust_domain=self._template.trust_domain,
                root_namespace=self._template.root_namespace,
                cluster_domain=self._template.cluster_domain,
            )
        return self._planners[name]


def name_of(gateway: KubeObject) -> GatewayName:
    """By which its Service, account and Deployment are found too."""
    return gateway.namespace, gateway.name


def gateways_of(objects: ObjectSet) -> Iterator[KubeObject]:
    """Those of our class."""
    return filter(is_ours, objects.of_kind(GATEWAY_API, "Gateway"))


def statuses(
    objects: ObjectSet,
    oversight: Oversight,
    deployed: Mapping[GatewayName, Deployed],
    root_namespace: str,
    now: str,
) -> Iterator[tuple[KubeObject, dict[str, Any]]]:
    """Each object whose status is not what it should be, with what it should be.

    `now` as RFC 3339 has it, for conditions that change.
    """
    own_class = objects.get(GATEWAY_API, "GatewayClass", "", CLASS)
    wanted: list[tuple[KubeObject, dict[str, Any] | None]] = []
    if own_class is not None:
        wanted.append((own_class, class_status(own_class, now)))
    gateways = list(gateways_of(objects))
    for gateway in gateways:
        found = deployed.get(name_of(gateway))
        if found is not None:
            wanted.append((gateway, gateway_status(gateway, found, now)))
    for kind in ROUTE_KINDS:
        for route in objects.of_kind(GATEWAY_API, kind):
            problems = oversight.problems.get(route.key, ())
            wanted.append((route, route_status(route, oversight.bound, problems, now)))
    places = {("Gateway", *name_of(each)) for each in gateways}
    places |= oversight.bound
    if gateways:
        places.add(("GatewayClass", root_namespace, CLASS))
    for group, kind in POLICY_KINDS:
        for policy in objects.of_kind(group, kind):
            if not places.isdisjoint(_targets(policy)):
                problems = oversight.problems.get(policy.key, ())
                wanted.append((policy, policy_status(policy, problems, now)))
    for about, status in wanted:
        held = about.body.get("status") or {}
        if status is not None and any(held.get(key) != value for key, value in status.items()):
            yield about, status


def _destinations(
    mesh: Snapshot, key: NamespacedHostname
) -> frozenset[NetworkAddress | NamespacedHostname]:
    """All ways to name a waypoint's Service."""
    service = mesh.service(key.namespace, key.hostname)
    return frozenset((key, *(service.addresses if service is not None else ())))


def _is_bound(own: frozenset[NetworkAddress | NamespacedHostname], service: Service) -> bool:
    return any(gateway.destination in own for gateway in all_waypoints(service))


def _targets(policy: KubeObject) -> Iterator[tuple[str, str, str]]:
    """(kind, namespace, name) of what a policy names; whatever is malformed is left out."""
    references = policy.spec.get("targetRefs") or [policy.spec.get("targetRef")]
    for each in references if isinstance(references, list) else ():
        if isinstance(each, Mapping):
            yield str(each.get("kind")), policy.namespace, str(each.get("name"))
