"""The agent's own metrics: `istio_build`, `process_*`, and `meshbpf_*` of its parts.

Numbers are read when somebody scrapes; nothing is counted here. What belongs
to a pod carries its name as a label and goes when it goes: a sum over pods
would fall, and a counter must not.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import meshbpf
from meshbpf.agent.api import CertInfo
from meshbpf.agent.runtime.connections import ConnectionStatistics
from meshbpf.agent.runtime.exposition import Family, Kind, label_text, labelled, single
from meshbpf.agent.runtime.logs import LogStatistics
from meshbpf.agent.runtime.pool import PoolStatistics

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Numbers:
    """What the parts of the agent say at the moment of a scrape."""

    ready: bool
    connections: ConnectionStatistics
    denied_early: Mapping[tuple[str, str], int]
    """By (reporter, error code)."""
    certs: Sequence[CertInfo]
    logs: LogStatistics
    pods: Mapping[str, int]
    """How many by state."""
    pools: Mapping[str, PoolStatistics]
    """Tunnels that each pod opened."""
    turned_away: Mapping[str, int]
    buffered: Mapping[str, int]
    cut_for_memory: Mapping[str, int]
    """Connections of each pod that were reset because it had its share."""
    predecessors: Sequence[int]
    """How many connections each agent carries that a reload has replaced."""
    mesh: Mapping[str, int]
    """How many workloads, services and policies the mesh state has."""
    mesh_version: int
    source_healthy: bool
    loop_lag_s: float | None
    decisions: Mapping[str, int] | None
    """What the kernel programs did, by name; None while they are not loaded."""


def build() -> Family:
    """Istio's build metric: dashboards look for the component `ztunnel`, whose role we have."""
    labels = label_text(("component", "tag"), ("ztunnel", f"meshbpf-{meshbpf.__version__}"))
    return Family("istio_build", "Istio component build info", Kind.GAUGE, [(labels, 1)])


def process() -> Iterator[Family]:
    """The process's descriptors, memory and time, by Prometheus' usual names."""
    # The descriptor that lists them is open meanwhile.
    descriptors = len(os.listdir("/proc/self/fd")) - 1
    yield single("process_open_fds", "Number of open file descriptors", Kind.GAUGE, descriptors)
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield single("process_max_fds", "Maximum number of file descriptors", Kind.GAUGE, soft)
    # After the command's name, which may hold anything; field 3 comes first.
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    user, system, threads, start = (int(stat[at - 3]) for at in (14, 15, 20, 22))
    yield single(
        "process_cpu_seconds",
        "User and system time spent in seconds",
        Kind.COUNTER,
        (user + system) / _TICKS_PER_S,
    )
    virtual, resident = (int(stat[at - 3]) for at in (23, 24))
    yield single("process_virtual_memory_bytes", "Virtual memory size", Kind.GAUGE, virtual)
    yield single(
        "process_resident_memory_bytes", "Resident memory size", Kind.GAUGE, resident * _PAGE_BYTES
    )
    yield single("process_threads", "Number of threads", Kind.GAUGE, threads)
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    yield single(
        "process_start_time_seconds",
        "Start time of the process since the Unix epoch",
        Kind.GAUGE,
        round(booted + start / _TICKS_PER_S, 2),
    )


def own(numbers: Numbers) -> Iterator[Family]:
    """`meshbpf_*`."""
    version = label_text(("version",), (meshbpf.__version__,))
    yield Family("meshbpf_build", "Version of the agent", Kind.GAUGE, [(version, 1)])
    yield single("meshbpf_ready", "1 when nothing is pending", Kind.GAUGE, int(numbers.ready))
    yield labelled("meshbpf_pods", "Pods of this agent", Kind.GAUGE, "state", numbers.pods)
    yield from _connections(numbers)
    yield from _tunnels(numbers.pools)
    yield labelled(
        "meshbpf_connections_turned_away",
        "Connections that were reset because their pod had its share",
        Kind.COUNTER,
        "pod",
        numbers.turned_away,
    )
    yield labelled(
        "meshbpf_buffered_bytes",
        "Bytes that wait for applications of a pod to read them",
        Kind.GAUGE,
        "pod",
        numbers.buffered,
    )
    yield labelled(
        "meshbpf_connections_cut_for_memory",
        "Connections that were reset because their pod held more unread bytes than it may",
        Kind.COUNTER,
        "pod",
        numbers.cut_for_memory,
    )
    yield single(
        "meshbpf_predecessors",
        "Agents that a reload has replaced and that still drain",
        Kind.GAUGE,
        len(numbers.predecessors),
    )
    yield single(
        "meshbpf_predecessor_connections",
        "Connections that they carry",
        Kind.GAUGE,
        sum(numbers.predecessors),
    )
    yield from _certificates(numbers.certs)
    yield from _logs(numbers.logs)
    yield labelled(
        "meshbpf_mesh_records",
        "Records of the mesh state in force",
        Kind.GAUGE,
        "kind",
        numbers.mesh,
    )
    yield single(
        "meshbpf_mesh_version",
        "Count of mesh states since the start",
        Kind.GAUGE,
        numbers.mesh_version,
    )
    yield single(
        "meshbpf_mesh_source_healthy",
        "1 when the source of the mesh state can be read",
        Kind.GAUGE,
        int(numbers.source_healthy),
    )
    if numbers.loop_lag_s is not None:
        yield single(
            "meshbpf_loop_lag_seconds",
            "Age of the event loop's last turn",
            Kind.GAUGE,
            numbers.loop_lag_s,
        )
    if numbers.decisions is not None:
        yield labelled(
            "meshbpf_steering_decisions",
            "What the kernel programs did with connections and packets",
            Kind.COUNTER,
            "decision",
            {name.lower(): count for name, count in numbers.decisions.items()},
        )


def _connections(numbers: Numbers) -> Iterator[Family]:
    totals = numbers.connections
    yield labelled(
        "meshbpf_connections_open",
        "Connections that the agent relays now",
        Kind.GAUGE,
        "direction",
        {"inbound": totals.open_inbound, "outbound": totals.open_outbound},
    )
    yield single(
        "meshbpf_connections_cut_by_policy",
        "Live connections that a later policy ended",
        Kind.COUNTER,
        totals.cut_by_policy,
    )
    yield Family(
        "meshbpf_connections_refused_early",
        "Connections refused before their workloads were known",
        Kind.COUNTER,
        [
            (label_text(("reporter", "code"), key), numbers.denied_early[key])
            for key in sorted(numbers.denied_early)
        ],
    )


def _tunnels(pools: Mapping[str, PoolStatistics]) -> Iterator[Family]:
    for name, told, kind in (
        ("tunnels", "HBONE tunnels that a pod's pool holds", Kind.GAUGE),
        ("streams", "Connections inside those tunnels", Kind.GAUGE),
        ("dialed", "HBONE tunnels opened", Kind.COUNTER),
        ("reused", "Connections that found a tunnel in the pool", Kind.COUNTER),
    ):
        values = {pod: getattr(pool, name) for pod, pool in pools.items()}
        yield labelled(f"meshbpf_pool_{name}", told, kind, "pod", values)


def _certificates(certs: Sequence[CertInfo]) -> Iterator[Family]:
    yield labelled(
        "meshbpf_certificate_expiry_timestamp_seconds",
        "When the certificate of an identity ends, since the Unix epoch",
        Kind.GAUGE,
        "identity",
        {cert.identity: cert.not_after.timestamp() for cert in certs if cert.not_after},
    )
    yield labelled(
        "meshbpf_certificate_failing",
        "1 when the newest attempt to get a certificate failed",
        Kind.GAUGE,
        "identity",
        {cert.identity: int(cert.error is not None) for cert in certs},
    )


def _logs(logs: LogStatistics) -> Iterator[Family]:
    yield single("meshbpf_log_records_written", "Log records written", Kind.COUNTER, logs.written)
    yield single(
        "meshbpf_log_records_dropped",
        "Log records dropped because nobody read the log fast enough",
        Kind.COUNTER,
        logs.dropped,
    )
    yield single("meshbpf_log_records_queued", "Log records that wait", Kind.GAUGE, logs.queued)
