"""The request metrics of a waypoint as families of an exposition."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from meshbpf.agent.l7.telemetry.request_metrics import (
    BUCKETS,
    HELP,
    NAMES,
    Metric,
    RequestMetrics,
    Sample,
)
from meshbpf.agent.l7.telemetry.tcp_metrics import TCP_LABELS, TcpMetrics, TcpSeries
from meshbpf.agent.l7.wasm.abi import MetricType
from meshbpf.agent.l7.wasm.shared import PluginMetrics
from meshbpf.agent.runtime.exposition import (
    Family,
    Kind,
    histogram_samples,
    label_text,
    single,
)

_NO_NAME = re.compile(r"[^a-zA-Z0-9_]")


def request_families(metrics: RequestMetrics) -> Iterator[Family]:
    """Istio's, and how many series there are."""
    found = list(metrics.samples())
    for metric in Metric:
        samples = [each for each in found if each.metric is metric]
        kind = Kind.COUNTER if metric.counted else Kind.HISTOGRAM
        lines = _counts(samples) if metric.counted else _histograms(samples)
        yield Family(NAMES[metric], HELP[metric], kind, lines)
    yield single("meshbpf_waypoint_series", "Series of request metrics", Kind.GAUGE, len(metrics))
    yield single(
        "meshbpf_waypoint_series_overflowed",
        "Requests counted without labels because there were too many series",
        Kind.COUNTER,
        metrics.overflowed,
    )


def tcp_families(metrics: TcpMetrics) -> Iterator[Family]:
    """Istio's four of opaque connections."""
    found = list(metrics)
    for name, told, read in _TCP:
        lines = [(label_text(TCP_LABELS, each.labels), read(each)) for each in found]
        yield Family(name, told, Kind.COUNTER, lines)


_TCP: tuple[tuple[str, str, Callable[[TcpSeries], int]], ...] = (
    ("istio_tcp_connections_opened", "Opaque connections opened", lambda one: one.opened),
    ("istio_tcp_connections_closed", "Opaque connections closed", lambda one: one.closed),
    ("istio_tcp_received_bytes", "Bytes from clients", lambda one: one.received_bytes),
    ("istio_tcp_sent_bytes", "Bytes to clients", lambda one: one.sent_bytes),
)


def policy_families(counts: Mapping[tuple[str, str], int]) -> Iterator[Family]:
    """What policies in dry-run would have done, and AUDIT policies noticed."""
    yield Family(
        "meshbpf_waypoint_policy_notes",
        "Requests that policies in dry-run would have answered, or AUDIT policies noticed",
        Kind.COUNTER,
        [(label_text(("policy", "effect"), key), count) for key, count in sorted(counts.items())],
    )


def plugin_families(metrics: PluginMetrics) -> Iterator[Family]:
    """What plugins count, under their own names."""
    for metric in metrics.found:
        # A name is a plugin's; Envoy puts the same prefix before it.
        name = f"wasmcustom_{_NO_NAME.sub('_', metric.name)}"
        told = f"Defined by a plugin as {metric.name}"
        match metric.kind:
            case MetricType.COUNTER:
                yield single(name.removesuffix("_total"), told, Kind.COUNTER, metric.value)
            case MetricType.GAUGE:
                yield single(name, told, Kind.GAUGE, metric.value)
            case MetricType.HISTOGRAM:
                yield single(f"{name}_sum", told, Kind.GAUGE, metric.value)
                yield single(f"{name}_count", told, Kind.GAUGE, metric.count)


def _counts(samples: list[Sample]) -> Iterator[tuple[str, int]]:
    for each in samples:
        yield label_text(each.names, each.values), each.count


def _histograms(samples: list[Sample]) -> Iterator[tuple[str, int | float]]:
    for each in samples:
        if each.histogram is not None:
            yield from histogram_samples(
                each.names, each.values, BUCKETS, each.histogram.counts, each.histogram.total
            )
