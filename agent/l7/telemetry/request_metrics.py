"""Istio's request metrics: three counters and three histograms for each set of labels.

A request costs one look-up by what its labels are made of; the labels
themselves are made once. The bounds: MAX_SERIES sets of labels, what comes
after that is counted in one set whose labels are all `unknown`, so that sums
stay true.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from meshbpf.agent.core.traffic import UNKNOWN
from meshbpf.agent.l7.exchange import Exchange
from meshbpf.agent.l7.telemetry.labels import LABELS, Labels, grpc_status, labels_of

MAX_SERIES = 10_000

# Envoy's default buckets (source/common/stats/histogram_impl.cc), as Istio has them.
BUCKETS = (
    0.5,
    1,
    5,
    10,
    25,
    50,
    100,
    250,
    500,
    1000,
    2500,
    5000,
    10000,
    30000,
    60000,
    300000,
    600000,
    1800000,
    3600000,
)


class Metric(StrEnum):
    """By their names in the Telemetry API."""

    REQUEST_COUNT = "REQUEST_COUNT"
    REQUEST_DURATION = "REQUEST_DURATION"
    REQUEST_SIZE = "REQUEST_SIZE"
    RESPONSE_SIZE = "RESPONSE_SIZE"
    GRPC_REQUEST_MESSAGES = "GRPC_REQUEST_MESSAGES"
    GRPC_RESPONSE_MESSAGES = "GRPC_RESPONSE_MESSAGES"

    @property
    def counted(self) -> bool:
        """Whether it is a counter; else a histogram."""
        return self not in (Metric.REQUEST_DURATION, Metric.REQUEST_SIZE, Metric.RESPONSE_SIZE)


NAMES = {
    Metric.REQUEST_COUNT: "istio_requests",
    Metric.REQUEST_DURATION: "istio_request_duration_milliseconds",
    Metric.REQUEST_SIZE: "istio_request_bytes",
    Metric.RESPONSE_SIZE: "istio_response_bytes",
    Metric.GRPC_REQUEST_MESSAGES: "istio_request_messages",
    Metric.GRPC_RESPONSE_MESSAGES: "istio_response_messages",
}
HELP = {
    Metric.REQUEST_COUNT: "The number of requests that were answered or cut",
    Metric.REQUEST_DURATION: "How long requests took, from their head to the end of the response",
    Metric.REQUEST_SIZE: "The size of request bodies",
    Metric.RESPONSE_SIZE: "The size of response bodies",
    Metric.GRPC_REQUEST_MESSAGES: "Messages of gRPC clients",
    Metric.GRPC_RESPONSE_MESSAGES: "Messages of gRPC servers",
}


@dataclass(slots=True, eq=False)
class Histogram:
    """Counts by bucket, the last one of what is above all bounds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    total: float = 0.0

    @property
    def observed(self) -> int:
        """How often."""
        return sum(self.counts)

    def record(self, value: float) -> None:
        """One observation."""
        self.counts[bisect_left(BUCKETS, value)] += 1
        self.total += value


@dataclass(frozen=True, slots=True)
class Sample:
    """One set of labels of one metric: name and value of each, and the count or histogram."""

    metric: Metric
    names: tuple[str, ...]
    values: Labels
    count: int
    histogram: Histogram | None


@dataclass(slots=True, eq=False)
class Bundle:
    """All metrics under the standard labels."""

    labels: Labels
    requests: int = 0
    duration: Histogram = field(default_factory=Histogram)
    request: Histogram = field(default_factory=Histogram)
    response: Histogram = field(default_factory=Histogram)
    grpc: list[int] | None = None
    """Messages of clients, and of servers; None where no gRPC was spoken."""

    def record(self, exchange: Exchange) -> None:
        """One exchange that is over."""
        self.requests += 1
        self.duration.record((exchange.ended_s - exchange.started_s) * 1000)
        self.request.record(exchange.request_bytes)
        self.response.record(exchange.response_bytes)
        sent, received = exchange.request_messages, exchange.response_messages
        if sent is not None and received is not None:
            self.grpc = self.grpc or [0, 0]
            self.grpc[0] += sent.total
            self.grpc[1] += received.total

    def sample(self, metric: Metric) -> tuple[int, Histogram | None] | None:
        """Count and histogram of one metric; None where it does not apply."""
        match metric:
            case Metric.REQUEST_COUNT:
                return self.requests, None
            case Metric.REQUEST_DURATION:
                return self.requests, self.duration
            case Metric.REQUEST_SIZE:
                return self.requests, self.request
            case Metric.RESPONSE_SIZE:
                return self.requests, self.response
        at = 0 if metric is Metric.GRPC_REQUEST_MESSAGES else 1
        return None if self.grpc is None else (self.grpc[at], None)


class RequestMetrics:
    """All series of a process."""

    def __init__(self, *, max_series: int = MAX_SERIES) -> None:
        self._max_series = max_series
        self._bundles: dict[Labels, Bundle] = {}
        self._shaped: dict[tuple[Metric, tuple[str, ...], Labels], Histogram] = {}
        """Series whose labels a Telemetry changed; of a counter only the total is read."""
        self._known: dict[tuple[Any, ...], tuple[Bundle, tuple[Any, ...]]] = {}
        self.overflowed = 0
        """Requests that were counted without labels because there were too many series."""

    def standard(self, exchange: Exchange) -> Bundle:
        """The bundle for an exchange, from memory where its labels were made before."""
        caller, response = exchange.caller, exchange.response
        # By identity: equality of workloads compares two dozen fields. What
        # the ids stand for is kept beside, so that none is used again.
        parts = (
            caller.workload,
            caller.identity,
            exchange.endpoint,
            exchange.endpoint_service or exchange.destination.service,
        )
        key = (
            *map(id, parts),
            exchange.protocol,
            0 if response is None else response.status,
            tuple(exchange.flags),
            grpc_status(exchange),
        )
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= self._max_series:
                self._known.clear()
            found = self._known[key] = (self._bundle(labels_of(exchange)), parts)
        return found[0]

    def shaped(self, metric: Metric, names: tuple[str, ...], values: Labels, value: float) -> None:
        """One observation under labels of one's own."""
        key = (metric, names, values)
        found = self._shaped.get(key)
        if found is None:
            if len(self) >= self._max_series:
                self.overflowed += 1
                key = (metric, LABELS, _UNKNOWN)
            found = self._shaped.setdefault(key, Histogram())
        found.record(value)

    def samples(self) -> Iterator[Sample]:
        """All there is, metric by metric."""
        for metric in Metric:
            for bundle in self._bundles.values():
                found = bundle.sample(metric) if bundle.requests else None
                if found is not None:
                    yield Sample(metric, LABELS, bundle.labels, *found)
            for (of, names, values), shaped in self._shaped.items():
                if of is metric:
                    count = int(shaped.total) if metric.counted else shaped.observed
                    yield Sample(metric, names, values, count, None if metric.counted else shaped)

    def __len__(self) -> int:
        return len(self._bundles) + len(self._shaped)

    def _bundle(self, labels: Labels) -> Bundle:
        found = self._bundles.get(labels)
        if found is None:
            if len(self) >= self._max_series:
                self.overflowed += 1
                labels = _UNKNOWN
            found = self._bundles.setdefault(labels, Bundle(labels))
        return found


_UNKNOWN = ("waypoint", *(UNKNOWN,) * (len(LABELS) - 1))
