"""What a waypoint serves, compiled: immutable, and swapped whole when anything changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from meshbpf.agent.core.service import Service
from meshbpf.agent.core.workload import NamespacedHostname
from meshbpf.agent.l7.exchange import Protocol
from meshbpf.agent.l7.filter import Chain
from meshbpf.agent.l7.problem import Problem
from meshbpf.agent.l7.rules import TcpRule
from meshbpf.agent.l7.table import RouteTable


@dataclass(frozen=True, slots=True)
class Routes:
    """The routes of one port for one kind of client; None where none is attached."""

    http: RouteTable | None = None
    tcp: TcpRule | None = None


NO_ROUTES = Routes()


@dataclass(frozen=True, slots=True)
class PortPlan:
    """One port of one service."""

    protocol: Protocol | None
    """As declared; None: look at the first bytes."""
    producer: Routes = NO_ROUTES
    """By routes of the service's own namespace, for every client."""
    consumers: Mapping[str, Routes] = field(default_factory=dict)
    """By routes of a client's namespace, for the clients of that namespace, in place of those."""

    def routes_for(self, namespace: str) -> Routes:
        """What holds for a client of this (proven) namespace."""
        return self.consumers.get(namespace, self.producer)


UNDECLARED = PortPlan(None)


@dataclass(frozen=True, slots=True)
class ServicePlan:
    """One service that is bound to this waypoint."""

    service: Service
    ports: Mapping[int, PortPlan]
    chain: Chain


@dataclass(frozen=True, slots=True)
class WaypointPlan:
    """All of them."""

    services: Mapping[NamespacedHostname, ServicePlan] = field(default_factory=dict)
    pods: Chain = field(default_factory=Chain)
    """For pods that are addressed themselves: no routes, only what the Gateway has."""
    protocols: Mapping[NamespacedHostname, Mapping[int, Protocol]] = field(default_factory=dict)
    """Declared protocols of all services, also of those that are only backends here."""
    problems: tuple[Problem, ...] = ()
    version: int = 0

    def protocol(self, service: NamespacedHostname, port: int) -> Protocol | None:
        """What a port speaks, if that is declared."""
        return self.protocols.get(service, {}).get(port)


EMPTY = WaypointPlan()
