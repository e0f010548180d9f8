"""`istio_dns_*`: ztunnel's names, labels and buckets (src/dns/metrics.rs).

Series belong to pods of this node and end with them: `expire` is told which
there are. Their number is bounded besides, since a client may ask for 65,536
types of record: those without a name share one.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from meshbpf.agent.core.names import RecordType
from meshbpf.agent.core.workload import Workload
from meshbpf.agent.runtime.exposition import (
    Family,
    Kind,
    histogram_samples,
    label_text,
    single,
)

LABELS = (
    "request_query_type",
    "request_protocol",
    "source_canonical_service",
    "source_canonical_revision",
)
BUCKETS_S = (0.0005, 0.001, 0.01, 0.1, 1.0, 5.0)
_TYPES = {
    **{kind.value: kind.name.lower() for kind in RecordType},
    2: "ns",
    6: "soa",
    12: "ptr",
    15: "mx",
    16: "txt",
    43: "ds",
    48: "dnskey",
    64: "svcb",
    65: "https",
    255: "any",
}


class Transport(StrEnum):
    """The label `request_protocol`."""

    UDP = "udp"
    TCP = "tcp"


@dataclass(slots=True)
class _Series:
    asked: int = 0
    forwarded: int = 0
    failed: int = 0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    seconds: float = 0.0


@dataclass(slots=True)
class Forwarding:
    """One question on its way to a resolver."""

    _series: _Series

    def failed(self) -> None:
        """No answer came."""
        self._series.failed += 1


class DnsMetrics:
    """The counters of all pods."""

    def __init__(self) -> None:
        self._series: dict[tuple[str, str, str, str], _Series] = {}
        self.dropped = 0
        """Queries and answers that found no room; the client repeats."""

    def asked(self, source: Workload | None, kind: int, transport: Transport) -> None:
        """A question came; `source` is None when the mesh does not know the pod."""
        self._of(source, kind, transport).asked += 1

    @contextmanager
    def forwarded(self, source: Workload, kind: int, transport: Transport) -> Iterator[Forwarding]:
        """Time what the block needs to have the resolver's answer."""
        series = self._of(source, kind, transport)
        series.forwarded += 1
        began = time.monotonic()
        try:
            yield Forwarding(series)
        finally:
            took_s = time.monotonic() - began
            series.buckets[bisect_left(BUCKETS_S, took_s)] += 1
            series.seconds += took_s

    def expire(self, local: Collection[Workload]) -> int:
        """Forget the series of pods that are not here any more; how many they were."""
        here = {_source(workload) for workload in local} | {_source(None)}
        gone = [key for key in self._series if key[2:] not in here]
        for key in gone:
            del self._series[key]
        return len(gone)

    def families(self) -> Iterator[Family]:
        """For the exposition."""
        for name, told, attribute in (
            ("istio_dns_requests", "Total number of DNS requests (unstable)", "asked"),
            (
                "istio_dns_upstream_requests",
                "Total number of DNS requests forwarded to upstream (unstable)",
                "forwarded",
            ),
            (
                "istio_dns_upstream_failures",
                "Total number of DNS requests that failed to forward upstream (unstable)",
                "failed",
            ),
        ):
            found = [
                (label_text(LABELS, key), getattr(series, attribute))
                for key, series in sorted(self._series.items())
                if getattr(series, attribute)
            ]
            yield Family(name, told, Kind.COUNTER, found)
        yield Family(
            "istio_dns_upstream_request_duration_seconds",
            "Total time in seconds Istio takes to get DNS response from upstream (unstable)",
            Kind.HISTOGRAM,
            [
                sample
                for key, series in sorted(self._series.items())
                if series.forwarded
                for sample in histogram_samples(
                    LABELS, key, BUCKETS_S, series.buckets, series.seconds
                )
            ],
        )
        told = "DNS queries and answers that found no room, which the client repeats"
        yield single("meshbpf_dns_dropped", told, Kind.COUNTER, self.dropped)

    def _of(self, source: Workload | None, kind: int, transport: Transport) -> _Series:
        key = (_TYPES.get(kind, "unknown"), transport.value, *_source(source))
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = _Series()
        return series


def _source(workload: Workload | None) -> tuple[str, str]:
    if workload is None:
        return ("unknown", "unknown")
    return (workload.canonical_name or "unknown", workload.canonical_revision or "unknown")
