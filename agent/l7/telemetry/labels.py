"""The labels of Istio's request metrics, with `reporter="waypoint"`.

Names and values are Istio's (istio.io, "Istio Standard Metrics"). An unset
label is the word `unknown`, as in the TCP metrics of the node agent.
"""

from __future__ import annotations

from meshbpf.agent.core.service import Service
from meshbpf.agent.core.traffic import UNKNOWN
from meshbpf.agent.core.workload import Workload
from meshbpf.agent.l7.exchange import Caller, Exchange, Protocol

LABELS = (
    "reporter",
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
    "destination_workload",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_cluster",
    "destination_service",
    "destination_service_name",
    "destination_service_namespace",
    "request_protocol",
    "response_code",
    "grpc_response_status",
    "response_flags",
    "connection_security_policy",
)

Labels = tuple[str, ...]

_NOBODY = (UNKNOWN,) * 7


def labels_of(exchange: Exchange) -> Labels:
    """A value for each of LABELS."""
    service = exchange.endpoint_service or exchange.destination.service
    return (
        "waypoint",
        *ends_of(exchange.caller, exchange.endpoint, service),
        protocol_label(exchange),
        str(exchange.response.status) if exchange.response is not None else "0",
        grpc_status(exchange),
        flags_of(exchange),
        security_of(exchange.caller),
    )


def ends_of(caller: Caller, endpoint: Workload | None, service: Service | None) -> Labels:
    """Who asked, who answered, and as what service: all labels from source to destination."""
    identity = caller.identity
    return (
        *_workload(caller.workload, UNKNOWN if identity is None else str(identity)),
        *_workload(endpoint, UNKNOWN if endpoint is None else str(endpoint.identity)),
        *_service(service),
    )


def security_of(caller: Caller) -> str:
    """`connection_security_policy`."""
    return "mutual_tls" if caller.identity is not None else "none"


def flags_of(exchange: Exchange) -> str:
    """Envoy's response flags; `-` without any."""
    return ",".join(exchange.flags) or "-"


def protocol_label(exchange: Exchange) -> str:
    """`http` for every HTTP that is not gRPC, as Istio has it."""
    return "grpc" if exchange.protocol is Protocol.GRPC else "http"


def grpc_status(exchange: Exchange) -> str:
    """The number, empty for what is not gRPC."""
    response = exchange.response
    if exchange.protocol is not Protocol.GRPC or response is None:
        return ""
    for headers in (response.trailers, response.headers):
        found = None if headers is None else headers.get("grpc-status")
        if found is not None:
            # A peer's text becomes a label's value: only a status does.
            return found if found.isascii() and found.isdigit() and len(found) < 3 else UNKNOWN
    return ""


def _workload(workload: Workload | None, principal: str) -> Labels:
    if workload is None:
        return (*_NOBODY[:4], principal, *_NOBODY[:3])
    canonical = workload.canonical_name or UNKNOWN
    revision = workload.canonical_revision or UNKNOWN
    return (
        workload.workload_name or UNKNOWN,
        canonical,
        revision,
        workload.namespace or UNKNOWN,
        principal,
        canonical,
        revision,
        workload.cluster_id or UNKNOWN,
    )


def _service(service: Service | None) -> Labels:
    if service is None:
        return (UNKNOWN, UNKNOWN, UNKNOWN)
    return (service.hostname, service.name, service.namespace)
