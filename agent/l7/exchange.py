"""One request with its answer, and all that the waypoint knows of both ends.

Made when the request's head is complete, handed to every filter and to the
router, read by telemetry when it is over.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from meshbpf.agent.core.address import SocketAddress
from meshbpf.agent.core.authority import Authority
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.service import Service
from meshbpf.agent.core.workload import Workload
from meshbpf.agent.l7.message import RequestHead, ResponseHead
from meshbpf.agent.wire.grpc import MessageCount


class Protocol(StrEnum):
    """What the inner stream speaks, under Istio's names for `request_protocol`."""

    HTTP1 = "http"
    HTTP2 = "http2"
    GRPC = "grpc"  # HTTP/2 whose content-type says so
    TCP = "tcp"


class Flag(StrEnum):
    """Envoy's response flags, as far as they occur here."""

    UPSTREAM_FAILURE = "UF"  # no connection to the endpoint
    NO_HEALTHY_UPSTREAM = "UH"
    NO_ROUTE = "NR"
    UPSTREAM_TIMEOUT = "UT"
    RETRIES_EXHAUSTED = "URX"
    UPSTREAM_RESET = "UC"  # it broke in mid-response
    DOWNSTREAM_RESET = "DC"
    RATE_LIMITED = "RL"
    UNAUTHORIZED_EXTERNAL = "UAEX"
    PROTOCOL_ERROR = "DPE"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `identity` is what mutual TLS proved; `address` the pod's, as the tunnel has it."""

    identity: SpiffeId | None
    address: SocketAddress
    workload: Workload | None = None
    """By its address in the mesh state; for telemetry, not for decisions."""

    @property
    def namespace(self) -> str:
        """The proven namespace, empty without one."""
        return "" if self.identity is None else self.identity.namespace


@dataclass(frozen=True, slots=True)
class Destination:
    """What the CONNECT asked for. A service, or (when it has none) a pod by its address."""

    authority: Authority
    port: int
    """The service's port, or the pod's."""
    service: Service | None = None
    workload: Workload | None = None
    """The pod when it was addressed itself; None behind a service."""
    address: SocketAddress | None = None
    """The address with port that policy may read; None when a hostname without one was asked."""


@dataclass(frozen=True, slots=True)
class Connection:
    """One opaque connection, or what is common to all requests of an inner stream."""

    caller: Caller
    destination: Destination
    protocol: Protocol


@dataclass(slots=True)
class Exchange:
    """One request and what became of it. Times are seconds of one monotonic clock."""

    connection: Connection
    request: RequestHead
    protocol: Protocol
    started_s: float
    started_wall_s: float
    request_id: str = ""
    response: ResponseHead | None = None
    """Set before `on_response`; also for a Reply of our own."""
    route: str = ""
    """NAMESPACE/NAME of the route object and its rule, once the router has chosen."""
    endpoint: Workload | None = None
    """Who answered, or was asked last."""
    endpoint_address: SocketAddress | None = None
    endpoint_service: Service | None = None
    """The backend's service, which a route may have made another one than was asked."""
    attempts: int = 0
    flags: list[Flag] = field(default_factory=list)
    detail: str = ""
    """Envoy's response code detail: `via_upstream`, `rbac_access_denied_matched_policy[..]`."""
    request_bytes: int = 0
    response_bytes: int = 0
    """Bodies only."""
    request_messages: MessageCount | None = None
    response_messages: MessageCount | None = None
    """Of gRPC."""
    first_byte_s: float = 0.0
    """When the response's head came; 0 without one."""
    ended_s: float = 0.0
    """Set before `on_end`."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """What a filter leaves for later ones, by a name that it documents."""

    def __post_init__(self) -> None:
        """Count messages where there are any."""
        if self.protocol is Protocol.GRPC:
            self.response_messages = MessageCount()
            self.restart_request()

    def restart_request(self) -> None:
        """The request's body is sent from its beginning, perhaps not for the first time."""
        self.request_bytes = 0
        if self.protocol is Protocol.GRPC:
            self.request_messages = MessageCount()

    def count_request(self, data: bytes) -> None:
        """Some of the request's body has gone on."""
        self.request_bytes += len(data)
        if self.request_messages is not None:
            self.request_messages.feed(data)

    def count_response(self, data: bytes) -> None:
        """Some of the answer's body has come."""
        self.response_bytes += len(data)
        if self.response_messages is not None:
            self.response_messages.feed(data)

    @property
    def caller(self) -> Caller:
        """Who asks."""
        return self.connection.caller

    @property
    def destination(self) -> Destination:
        """What was asked for."""
        return self.connection.destination
