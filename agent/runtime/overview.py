"""What the status page shows, in one answer: health, pods, certificates, flows, denials."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from meshbpf.agent.api import CertInfo, ConnectionInfo, PodInfo, StatusResult
from meshbpf.agent.runtime.telemetry import Telemetry

MAX_CONNECTIONS = 200
TOP_FLOWS = 10


class FlowInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Totals between two workloads since their metrics began."""

    source: str
    destination: str
    connections: int
    bytes_sent: int
    """Towards the destination."""
    bytes_received: int


class DenialInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A connection that was not let through."""

    at: datetime
    direction: str
    source: str
    destination: str
    reason: str


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """The page's data; lists are bounded."""

    status: StatusResult
    pods: tuple[PodInfo, ...]
    certs: tuple[CertInfo, ...]
    connections: tuple[ConnectionInfo, ...]
    connections_total: int
    flows: tuple[FlowInfo, ...]
    denials: tuple[DenialInfo, ...]


def flows(telemetry: Telemetry) -> tuple[FlowInfo, ...]:
    """The pairs of workloads with the most bytes."""
    return tuple(
        FlowInfo(
            source=one.source,
            destination=one.destination,
            connections=one.connections,
            bytes_sent=one.bytes_sent,
            bytes_received=one.bytes_received,
        )
        for one in telemetry.traffic.top_flows(TOP_FLOWS)
    )


def denials(telemetry: Telemetry) -> tuple[DenialInfo, ...]:
    """The last denials, newest first."""
    return tuple(
        DenialInfo(
            at=datetime.fromtimestamp(one.at, UTC),
            direction=one.direction,
            source=one.source,
            destination=one.destination,
            reason=one.reason,
        )
        for one in telemetry.denials()
    )
