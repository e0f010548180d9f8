"""The access log: one line when a connection ends, one (at debug) when it opens.

Scope `access`, with ztunnel's messages, levels and field names, so that its
parsers fit: "connection complete" at info, or at error with `error`;
"connection opened" at debug; "connection failed" at warn for what was refused
before anything was known of it. `logs.py` writes the lines and never waits.

Identities are told only where mutual TLS is in force. `bytes_sent` is what
this node's pod sent, whichever side that is; an inbound `dst.addr` keeps the
tunnel's port 15008, and `dst.hbone_addr` is what was asked of the tunnel. A
field `path=kernel` marks connections that the agent did not carry.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from meshbpf.agent.core.address import SocketAddress
from meshbpf.agent.core.traffic import LABELS, UNKNOWN, Labels, Reporter

if TYPE_CHECKING:
    from meshbpf.agent.core.workload import Workload
    from meshbpf.agent.datapath.flowcodecs import FlowRecord
    from meshbpf.agent.l7.telemetry.trace import SpanContext
    from meshbpf.agent.runtime.connections import LiveConnection

access_log = logging.getLogger("access")
TRACE = "trace"
"""The attribute of a record that holds its connection's span, where spans are exported."""

_SOURCE_SERVICE = LABELS.index("source_canonical_service")
_SOURCE_NAMESPACE = LABELS.index("source_workload_namespace")
_SOURCE_PRINCIPAL = LABELS.index("source_principal")
_SOURCE_CLUSTER = LABELS.index("source_cluster")
_SERVICE = LABELS.index("destination_service")
_SERVER_SERVICE = LABELS.index("destination_canonical_service")
_NAMESPACE = LABELS.index("destination_workload_namespace")
_CLUSTER = LABELS.index("destination_cluster")
_PRINCIPAL = LABELS.index("destination_principal")
_DIRECTION = {Reporter.SOURCE: "outbound", Reporter.DESTINATION: "inbound"}


def opened(live: LiveConnection, labels: Labels) -> None:
    """Say that a connection begins; costs next to nothing unless debug is on."""
    if access_log.isEnabledFor(logging.DEBUG):
        fields = {**_ends(live, labels), "direction": _DIRECTION[live.reporter]}
        _write(logging.DEBUG, "connection opened", fields, live.trace)


def complete(
    live: LiveConnection,
    labels: Labels,
    duration_s: float,
    fields: dict[str, object] | None = None,
) -> None:
    """Say that a connection has ended, and why if it ended badly.

    `fields` are its `complete_fields`, from who has them already.
    """
    level = logging.ERROR if live.error else logging.INFO
    if not access_log.isEnabledFor(level):
        return
    if fields is None:
        fields = complete_fields(live, labels, duration_s)
    _write(level, "connection complete", fields, live.trace)


def complete_fields(live: LiveConnection, labels: Labels, duration_s: float) -> dict[str, object]:
    """What is told of a connection that has ended: by its line here, and by its span."""
    sent, received = live.sent.total, live.received.total
    inbound = live.reporter is Reporter.DESTINATION
    return {
        **_ends(live, labels),
        "direction": _DIRECTION[live.reporter],
        "bytes_sent": received if inbound else sent,
        "bytes_recv": sent if inbound else received,
        "duration": f"{int(duration_s * 1000)}ms",
        "error": live.error or None,
    }


def wants_complete() -> bool:
    """Whether anybody reads of connections that ended well."""
    return access_log.isEnabledFor(logging.INFO)


def carried(
    record: FlowRecord,
    reporter: Reporter,
    labels: Labels,
    source: Workload | None,
    destination: Workload,
) -> None:
    """Say that a connection has ended which the kernel carried: `path` is then `kernel`."""
    inbound = reporter is Reporter.DESTINATION
    # Attested, where TLS would have proven it; plaintext has no identity at either end.
    caller = _told(labels, _SOURCE_PRINCIPAL)
    fields: dict[str, object] = {
        "src.addr": record.flow.source,
        "src.workload": source.name if source is not None else None,
        "src.namespace": _told(labels, _SOURCE_NAMESPACE),
        "src.identity": caller,
        "src.cluster": _told(labels, _SOURCE_CLUSTER),
        "dst.addr": record.flow.destination,
        "dst.service": _told(labels, _SERVICE),
        "dst.workload": destination.name,
        "dst.namespace": _told(labels, _NAMESPACE),
        "dst.identity": _told(labels, _PRINCIPAL) if caller else None,
        "dst.cluster": _told(labels, _CLUSTER),
        "direction": _DIRECTION[reporter],
        "path": "kernel",
        "bytes_sent": record.received if inbound else record.sent,
        "bytes_recv": record.sent if inbound else record.received,
        "duration": f"{(record.closed_ns - record.opened_ns) // 1_000_000}ms",
        "error": "not established" if record.failed else None,
    }
    _write(logging.ERROR if record.failed else logging.INFO, "connection complete", fields)


def denied_early(
    source: SocketAddress, destination: SocketAddress, reporter: Reporter, error: str
) -> None:
    """Say that a connection was refused before its workloads were known."""
    if access_log.isEnabledFor(logging.WARNING):
        fields = {
            "src.addr": source,
            "dst.addr": destination,
            "direction": _DIRECTION[reporter],
            "error": error,
        }
        _write(logging.WARNING, "connection failed", fields)


def _write(
    level: int, message: str, fields: dict[str, object], trace: SpanContext | None = None
) -> None:
    # Not Logger.log(): it walks the stack for a line number that nobody prints,
    # which is a third of its 20 us.
    record = logging.LogRecord(access_log.name, level, "", 0, message, None, None)
    record.fields = fields
    if trace is not None:
        setattr(record, TRACE, trace)
    access_log.handle(record)


def _told(labels: Labels, index: int) -> str | None:
    return None if labels[index] == UNKNOWN else labels[index]


def _ends(live: LiveConnection, labels: Labels) -> dict[str, object]:
    source, destination = live.source_workload, live.destination_workload
    mutual_tls = live.mutual_tls

    def told(index: int) -> str | None:
        return _told(labels, index)

    return {
        "src.addr": live.source,
        "src.workload": source.name if source is not None else told(_SOURCE_SERVICE),
        "src.namespace": told(_SOURCE_NAMESPACE),
        "src.identity": told(_SOURCE_PRINCIPAL) if mutual_tls else None,
        "src.cluster": told(_SOURCE_CLUSTER),
        "dst.addr": live.tunnel_address or live.upstream or live.target or live.destination,
        "dst.hbone_addr": live.target if live.tunnel_address else None,
        "dst.service": told(_SERVICE),
        "dst.workload": destination.name if destination is not None else told(_SERVER_SERVICE),
        "dst.namespace": told(_NAMESPACE),
        "dst.identity": told(_PRINCIPAL) if mutual_tls else None,
        "dst.cluster": told(_CLUSTER),
    }
