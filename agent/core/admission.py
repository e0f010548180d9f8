"""Who may reach a workload: what policy says, and the waypoint where one is required.

Istio's own data plane lets whoever dials a pod's address go past its waypoint,
and so past the waypoint's policies. Where the mesh's setting asks for it, a
workload that is bound to a waypoint, itself or by a service that it is an
endpoint of, is reached by that waypoint alone: others, and plaintext, are
refused at the destination, whoever carries the connection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from meshbpf.agent.core.authz import ConnectionFacts, Decision, PolicySet, authorize
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.service import Service
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.waypoint import all_waypoints, expected_identities, named
from meshbpf.agent.core.workload import GatewayAddress, Workload


@dataclass(frozen=True, slots=True, eq=False)
class Admission:
    """The rules of one workload under one state."""

    policies: PolicySet
    only_from: frozenset[SpiffeId] | None = None
    """Whom its waypoints may prove to be, where it is reached through them alone; else None."""

    def decide(self, facts: ConnectionFacts) -> Decision:
        """May this connection reach it?"""
        if self.only_from is not None and facts.source_identity not in self.only_from:
            who = facts.source_identity or "plaintext, which proves no identity,"
            return Decision(False, None, f"{who} is not the waypoint that is required")
        return authorize(self.policies, facts)

    def says_as(self, other: Admission | None) -> bool:
        """Whether both decide every connection alike, as far as can be told at a glance."""
        return (
            other is not None
            and self.policies is other.policies
            and self.only_from == other.only_from
        )


def admission(mesh: Snapshot, workload: Workload) -> Admission:
    """The rules of `workload` in `mesh`."""
    policies = mesh.policies_for(workload)
    if not mesh.require_waypoint:
        return Admission(policies)
    gateways = set(_waypoints(mesh, workload))
    # A waypoint that is not in the mesh (yet) is nobody: nothing is let in until it is.
    who = frozenset(one for each in gateways for one in _identities(mesh, workload, each))
    if not gateways or workload.identity in who:
        # The second is a waypoint: in front of itself it would be reached by nobody.
        return Admission(policies)
    return Admission(policies, who)


def _waypoints(mesh: Snapshot, workload: Workload) -> Iterator[GatewayAddress]:
    if workload.waypoint is not None:
        yield workload.waypoint
    for key in workload.services:
        service = mesh.service(key.namespace, key.hostname)
        if service is not None:
            yield from all_waypoints(service)


def _identities(mesh: Snapshot, workload: Workload, gateway: GatewayAddress) -> frozenset[SpiffeId]:
    match named(mesh, workload, gateway):
        case None:
            return frozenset()
        case Workload() as waypoint:
            return waypoint.identities
        case Service() as service:
            found = (expected_identities(e.workload, service) for e in mesh.endpoints(service))
            return frozenset().union(*found)
