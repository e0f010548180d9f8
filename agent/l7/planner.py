"""From objects and mesh state to a plan.

A route that cannot be read is told as a Problem, by field. If it could be
read before, what it said then stays in force, so that a typing error takes no
service down; else it is as if it were not there. All other routes take
effect. The rule for policies is their sources' (`registry.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from meshbpf.agent.core.kube_names import NETWORKING
from meshbpf.agent.core.objects import KubeObject, ObjectKey, ObjectSet
from meshbpf.agent.core.service import Service
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import NamespacedHostname
from meshbpf.agent.l7.exchange import Protocol
from meshbpf.agent.l7.filter import Chain, Filter
from meshbpf.agent.l7.plan import NO_ROUTES, PortPlan, Routes, ServicePlan, WaypointPlan
from meshbpf.agent.l7.problem import ObjectError, Problem
from meshbpf.agent.l7.protocols import declared, declared_by_entry
from meshbpf.agent.l7.rate_limit import GROUP as OWN_GROUP
from meshbpf.agent.l7.rate_limit import KIND as RATE_LIMIT
from meshbpf.agent.l7.rate_limit import read_rate_limit
from meshbpf.agent.l7.read_routes import ParentRef, ReadRoute, read_route
from meshbpf.agent.l7.references import GATEWAY_API, References
from meshbpf.agent.l7.registry import SOURCES
from meshbpf.agent.l7.rules import Entry, TcpRule
from meshbpf.agent.l7.sources import FilterSource, Scope, kind_of
from meshbpf.agent.l7.table import RouteTable

ROUTE_KINDS = ("HTTPRoute", "GRPCRoute", "TCPRoute", "TLSRoute")


@dataclass(slots=True)
class _Collected:
    """What routes of one origin give to one port."""

    entries: list[Entry] = field(default_factory=list)
    tcp: list[tuple[tuple[str, str], TcpRule]] = field(default_factory=list)

    def routes(self) -> Routes:
        # The oldest TCPRoute wins; the others would never be reached.
        tcp = min(self.tcp, key=lambda each: each[0])[1] if self.tcp else None
        return Routes(RouteTable(self.entries) if self.entries else None, tcp)


_Place = tuple[NamespacedHostname, int, str]
"""Service, port (0: all), and the consumers' namespace ("" for the producer's routes)."""


class Planner:
    """Makes the plans of one waypoint, one after the other."""

    def __init__(
        self,
        namespace: str,
        name: str,
        *,
        trust_domain: str = "cluster.local",
        root_namespace: str = "istio-system",
        cluster_domain: str = "cluster.local",
        sources: Sequence[FilterSource] = SOURCES,
        keep: dict[tuple[str, ...], Any] | None = None,
    ) -> None:
        """`keep` is what filters keep from one plan to the next (sources.py)."""
        self._key = ObjectKey(GATEWAY_API, "Gateway", namespace, name)
        self._trust_domain = trust_domain
        self._root_namespace = root_namespace
        self._cluster_domain = cluster_domain
        self._sources = sources
        self._good: dict[ObjectKey, ReadRoute] = {}
        self._keep = {} if keep is None else keep
        self._version = 0

    def plan(
        self, objects: ObjectSet, mesh: Snapshot, bound: Callable[[Service], bool]
    ) -> WaypointPlan:
        """Compile. `bound` tells the services of this waypoint."""
        self._version += 1
        problems: list[Problem] = []
        gateway = objects.by_key.get(self._key) or KubeObject(self._key, "v1", {})
        # In an order of their own: the mesh has none, and problems are told in this one.
        mine = {each.key: each for each in filter(bound, mesh.services)}
        services = dict(sorted(mine.items(), key=lambda one: (one[0].namespace, one[0].hostname)))
        places = self._attach(objects, mesh, gateway, services, problems)
        plans: dict[NamespacedHostname, ServicePlan] = {}
        protocols = self._protocols(objects)
        for key, service in services.items():
            spoken = protocols.get(key, {})
            ports = {port: _port(places, key, port, spoken.get(port)) for port in service.ports}
            chain = self._chain(objects, gateway, service, problems)
            plans[key] = ServicePlan(service, ports, chain)
        pods = self._chain(objects, gateway, None, problems)
        # Several destinations find the same fault of one policy.
        return WaypointPlan(plans, pods, protocols, tuple(dict.fromkeys(problems)), self._version)

    def _protocols(self, objects: ObjectSet) -> dict[NamespacedHostname, dict[int, Protocol]]:
        """What ports are declared to speak. A hostname of both is the Service's."""
        found: dict[NamespacedHostname, dict[int, Protocol]] = {}
        for entry in objects.of_kind(NETWORKING, "ServiceEntry"):
            hosts = entry.spec.get("hosts")
            for host in hosts if isinstance(hosts, list) else ():
                found[NamespacedHostname(entry.namespace, str(host))] = declared_by_entry(entry)
        for each in objects.of_kind("", "Service"):
            found[self._key_of(each)] = declared(each)
        return found

    def _key_of(self, service: KubeObject) -> NamespacedHostname:
        hostname = f"{service.name}.{service.namespace}.svc.{self._cluster_domain}"
        return NamespacedHostname(service.namespace, hostname)

    # -- routes

    def _attach(
        self,
        objects: ObjectSet,
        mesh: Snapshot,
        gateway: KubeObject,
        services: dict[NamespacedHostname, Service],
        problems: list[Problem],
    ) -> dict[_Place, _Collected]:
        references = References(objects, mesh.service, self._extend, self._cluster_domain)
        kinds = _allowed_kinds(gateway)
        parents = _Parents(mesh, references.hostname)
        places: dict[_Place, _Collected] = defaultdict(_Collected)
        read: dict[ObjectKey, ReadRoute] = {}
        for kind in ROUTE_KINDS:
            for route in objects.of_kind(GATEWAY_API, kind):
                found = self._read(route, references, problems)
                if found is None:
                    continue
                read[route.key] = found
                for parent in found.parents:
                    consumer = "" if route.namespace == parent.namespace else route.namespace
                    known = parents.of(parent)
                    if not known:
                        problems.append(_no_parent(route, parent, f"there is no {parent}"))
                    for key in known:
                        service = services.get(key)
                        if service is None:
                            continue  # another waypoint's, or none's
                        wrong = _misfit(route, parent, service, kinds)
                        if wrong is None:
                            _collect(places[key, parent.port, consumer], route, found)
                        else:
                            problems.append(wrong)
        self._good = read
        problems += references.problems
        return places

    def _read(
        self, route: KubeObject, references: References, problems: list[Problem]
    ) -> ReadRoute | None:
        try:
            return read_route(route, references)
        except ObjectError as error:
            problems.append(error.problem(route))
            return self._good.get(route.key)

    def _extend(self, about: KubeObject) -> Filter | None:
        if (about.key.group, about.key.kind) != (OWN_GROUP, RATE_LIMIT):
            return None
        return read_rate_limit(about, self._keep, "route")

    # -- filters

    def _chain(
        self,
        objects: ObjectSet,
        gateway: KubeObject,
        service: Service | None,
        problems: list[Problem],
    ) -> Chain:
        scope = Scope(
            objects, gateway, service, self._trust_domain, self._root_namespace, self._keep
        )
        filters: list[Filter] = []
        for source in self._sources:
            found, wrong = source(scope)
            filters += found
            problems += wrong
        return Chain.of(filters)


def _port(
    places: dict[_Place, _Collected], key: NamespacedHostname, port: int, protocol: Protocol | None
) -> PortPlan:
    """Routes for this port and routes for all ports count together."""
    merged: dict[str, _Collected] = defaultdict(_Collected)
    for (service, number, consumer), found in places.items():
        if service == key and number in (0, port):
            merged[consumer].entries += found.entries
            merged[consumer].tcp += found.tcp
    routes = {consumer: each.routes() for consumer, each in merged.items()}
    producer = routes.pop("", NO_ROUTES)
    return PortPlan(protocol, producer, routes)


def _collect(place: _Collected, route: KubeObject, found: ReadRoute) -> None:
    place.entries += found.entries
    if found.tcp is not None:
        created = str(route.metadata.get("creationTimestamp") or "")
        place.tcp.append(((created, f"{route.namespace}/{route.name}"), found.tcp))


class _Parents:
    """Which services of the mesh a parentRef means: one, or all hosts of a ServiceEntry."""

    def __init__(self, mesh: Snapshot, hostname: Callable[[str, str], str]) -> None:
        self._mesh = mesh
        self._hostname = hostname
        self._entries: dict[tuple[str, str], list[NamespacedHostname]] | None = None

    def of(self, parent: ParentRef) -> Sequence[NamespacedHostname]:
        """Their keys; none when there is no such object."""
        if parent.kind == "ServiceEntry":
            return self._of_entries().get((parent.namespace, parent.name), ())
        hostname = self._hostname(parent.namespace, parent.name)
        found = self._mesh.service(parent.namespace, hostname)
        return () if found is None else (found.key,)

    def _of_entries(self) -> dict[tuple[str, str], list[NamespacedHostname]]:
        if self._entries is None:
            self._entries = defaultdict(list)
            for each in self._mesh.services:
                if kind_of(each) == "ServiceEntry":
                    self._entries[each.namespace, each.name].append(each.key)
        return self._entries


def _no_parent(route: KubeObject, parent: ParentRef, what: str) -> Problem:
    return Problem(route.key, route.origin, parent.path, what, reason="NoMatchingParent")


def _misfit(
    route: KubeObject, parent: ParentRef, service: Service, kinds: frozenset[str] | None
) -> Problem | None:
    """Why a route cannot be attached to a parent of ours."""
    if parent.port and parent.port not in service.ports:
        return _no_parent(route, parent, f"{parent} has no port {parent.port}")
    if kinds is not None and route.key.kind not in kinds:
        what = f"the Gateway's listener allows {', '.join(sorted(kinds))} only"
        return Problem(route.key, route.origin, parent.path, what, reason="NotAllowedByListeners")
    return None


def _allowed_kinds(gateway: KubeObject) -> frozenset[str] | None:
    """`allowedRoutes.kinds` of the HBONE listener; None: all."""
    for listener in gateway.spec.get("listeners") or ():
        if listener.get("protocol") == "HBONE":
            kinds = (listener.get("allowedRoutes") or {}).get("kinds")
            if kinds:
                return frozenset(str(each.get("kind")) for each in kinds)
    return None
