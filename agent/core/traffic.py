"""The labels of Istio's TCP metrics: who talked to whom, and how it ended.

Names, order and values are those of ztunnel's `istio_tcp_*` series (rows T1 to
T9 of docs/compat.md), so that dashboards and rules written for it keep working.
Two things surprise: an unset label is the word `unknown`, never empty; and
`received_bytes` are the request's bytes on both sides, client to server.

Pure: everything comes in as an argument, also what the peer said of itself
(its baggage), which is used only where the mesh state knows nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.service import Service
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import Workload

UNKNOWN = "unknown"

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
    "destination_service",
    "destination_service_namespace",
    "destination_service_name",
    "destination_workload",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_cluster",
    "request_protocol",
    "response_flags",
    "connection_security_policy",
    "source_region",
    "source_zone",
    "destination_region",
    "destination_zone",
)
"""In the order in which they are written."""

FLAG_AT = LABELS.index("response_flags")

Labels = tuple[str, ...]
"""A value for each of LABELS."""


class Reporter(StrEnum):
    """Which end of the connection counts it: ours is the source's, or the destination's."""

    SOURCE = "source"
    DESTINATION = "destination"


class ResponseFlag(StrEnum):
    """Why a connection failed; NONE when it did not."""

    NONE = "-"
    DENY = "DENY"
    CONNECT = "CONNECT"
    TLS_FAILURE = "TLS_FAILURE"
    H2_HANDSHAKE_FAILURE = "H2_HANDSHAKE_FAILURE"
    NETWORK_POLICY = "NETWORK_POLICY"
    IDENTITY_ERROR = "IDENTITY_ERROR"
    CERT_REVOKED = "CERT_REVOKED"


@dataclass(frozen=True, slots=True)
class Described:
    """What a peer's baggage says of its workload; "" for what it does not say."""

    cluster: str = ""
    namespace: str = ""
    workload: str = ""
    service: str = ""
    revision: str = ""
    region: str = ""
    zone: str = ""


_NOBODY = Described()


@lru_cache(maxsize=1024)
def parse_baggage(text: str) -> Described:
    """Read a `baggage` header; members that nobody asked for are passed over.

    Cached: a workload says the same with each of its connections.
    """
    found: dict[str, str] = {}
    for member in text.split(","):
        name, equals, value = member.strip().partition("=")
        if not equals:
            continue
        match name:
            case "k8s.cluster.name":
                found["cluster"] = value
            case "k8s.namespace.name":
                found["namespace"] = value
            case "service.name":
                found["service"] = value
            case "service.version":
                found["revision"] = value
            case "cloud.region":
                found["region"] = value
            case "cloud.availability_zone":
                found["zone"] = value
            case _ if name.startswith("k8s.") and name.endswith(".name"):
                found["workload"] = value  # k8s.deployment.name, k8s.pod.name ...
    return Described(**found)


def labels(
    reporter: Reporter,
    *,
    source: Workload | None,
    described: Described | None,
    source_identity: SpiffeId | None,
    destination: Workload | None,
    service: Service | None,
    mutual_tls: bool,
    flag: ResponseFlag = ResponseFlag.NONE,
    destination_described: Described | None = None,
    destination_identity: SpiffeId | None = None,
) -> Labels:
    """A value for each label of one connection.

    `source_identity` is what mutual TLS proves (or will prove) of the client;
    the destination's principal is what the mesh state says, as in ztunnel. A
    destination behind another network's gateway is not in the state: it is
    what it says of itself, and its identity what it has proven.
    """
    source_principal = UNKNOWN if source_identity is None else str(source_identity)
    if source is not None:
        place = source.locality
        name, canonical = source.workload_name or UNKNOWN, source.canonical_name or UNKNOWN
        revision = source.canonical_revision or UNKNOWN
        client: Labels = (
            name,
            canonical,
            revision,
            source.namespace or UNKNOWN,
            source_principal,
            canonical,
            revision,
            source.cluster_id or UNKNOWN,
        )
        client_place = (place.region or UNKNOWN, place.zone or UNKNOWN)
    else:
        said = described or _NOBODY
        client = _as_described(said, source_principal)
        client_place = (said.region or UNKNOWN, said.zone or UNKNOWN)
    if service is not None:
        asked: Labels = (service.hostname, service.namespace, service.name)
    else:
        asked = (UNKNOWN, UNKNOWN, UNKNOWN)
    if destination is not None:
        place = destination.locality
        canonical = destination.canonical_name or UNKNOWN
        revision = destination.canonical_revision or UNKNOWN
        server: Labels = (
            destination.workload_name or UNKNOWN,
            canonical,
            revision,
            destination.namespace or UNKNOWN,
            str(destination.identity),
            canonical,
            revision,
            destination.cluster_id or UNKNOWN,
        )
        server_place = (place.region or UNKNOWN, place.zone or UNKNOWN)
    else:
        said = destination_described or _NOBODY
        principal = UNKNOWN if destination_identity is None else str(destination_identity)
        server = _as_described(said, principal)
        server_place = (said.region or UNKNOWN, said.zone or UNKNOWN)
    return (
        reporter.value,
        *client,
        *asked,
        *server,
        "tcp",
        flag.value,
        "mutual_tls" if mutual_tls else UNKNOWN,
        *client_place,
        *server_place,
    )


def _as_described(said: Described, principal: str) -> Labels:
    """The eight labels of an end that only its own words describe."""
    name, revision = said.workload or UNKNOWN, said.revision or UNKNOWN
    return (
        name,
        said.service or UNKNOWN,
        revision,
        said.namespace or UNKNOWN,
        principal,
        name,  # sic: of a described peer `app` is the workload's name
        revision,
        said.cluster or UNKNOWN,
    )


def inbound_service(
    mesh: Snapshot, workload: Workload, port: int, host: str | None, certain: Service | None
) -> Service | None:
    """The service that a client of `workload` most likely meant, for telemetry alone.

    `certain` if routing knows; else the service of the workload that the
    client named (`host`, from its Forwarded header: of these few only); else
    the first one that leads to `port`.
    """
    if certain is not None:
        return certain
    leading: Service | None = None
    for key, ports in workload.services.items():
        service = mesh.service(key.namespace, key.hostname)
        if service is None:
            continue
        if service.hostname == host:
            return service
        if leading is None and (port in ports.values() or port in service.ports.values()):
            leading = service
    return leading
