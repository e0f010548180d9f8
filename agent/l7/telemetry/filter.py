"""The filter that tells of requests: it stands last, and counts what became of each.

A TCP connection is not told of here: who carries it counts it (tcp_metrics.py).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from meshbpf.agent.core.traffic import UNKNOWN
from meshbpf.agent.l7.authz.filter import AUDITED, REHEARSED
from meshbpf.agent.l7.exchange import Exchange
from meshbpf.agent.l7.filter import CONTINUE, Filter, Outcome, Phase
from meshbpf.agent.l7.providers import OtlpTracing
from meshbpf.agent.l7.telemetry.cel import Evaluate
from meshbpf.agent.l7.telemetry.labels import LABELS, flags_of
from meshbpf.agent.l7.telemetry.log_format import Line
from meshbpf.agent.l7.telemetry.request_metrics import Metric, RequestMetrics
from meshbpf.agent.l7.telemetry.rules import MetricRules, TraceRules
from meshbpf.agent.l7.telemetry.tcp_metrics import TcpMetrics
from meshbpf.agent.l7.telemetry.trace import SPAN, Span, SpanContext, begin_span, propagate

_MAX_VALUE_CHARS = 256
_SERVER_ERROR = 500


@dataclass(slots=True)
class Sinks:
    """Where it is told; outlives changes of the objects. The shell sets what does I/O."""

    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    tcp: TcpMetrics = field(default_factory=TcpMetrics)
    """Whoever carries opaque connections counts them here."""
    write_line: Callable[[str, str], None] = lambda _path, _line: None
    """(path, line): must not wait."""
    export_span: Callable[[OtlpTracing, Span], None] = lambda _provider, _span: None
    """Must not wait."""
    rng: random.Random = field(default_factory=random.Random)
    policies: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By policy and what it would have done, or that it noticed: dry-run and AUDIT."""


@dataclass(frozen=True, slots=True)
class LogTarget:
    """One access log: where, in which form, and of which requests."""

    path: str
    line: Line
    wanted: Evaluate | None = None


@dataclass(frozen=True, slots=True)
class Tracing:
    """Spans for one provider."""

    provider: OtlpTracing
    rules: TraceRules
    sampling_percent: float


class BeginSpan(Filter):
    """Stands first, so that authorizers see the trace and refused requests are in it."""

    phase = Phase.CALLER
    name = "tracing"

    def __init__(self, sinks: Sinks, tracing: Tracing) -> None:
        self._rng = sinks.rng
        self._sampling_percent = tracing.sampling_percent
        self._propagate = tracing.rules.propagate

    def on_request(self, exchange: Exchange) -> Outcome:
        """Begin a span."""
        headers = exchange.request.headers
        span = begin_span(headers, self._rng, self._sampling_percent)
        exchange.attributes[SPAN] = span
        if self._propagate:
            propagate(headers, span)
        return CONTINUE


class TelemetryFilter(Filter):
    """All that is told at one destination."""

    phase = Phase.STATS
    name = "telemetry"

    def __init__(
        self,
        sinks: Sinks,
        logs: Sequence[LogTarget],
        tracing: Tracing | None,
        metrics: Mapping[Metric, MetricRules],
    ) -> None:
        self._sinks = sinks
        self._logs = tuple(logs)
        self._tracing = tracing
        self._standard = all(rules.standard for rules in metrics.values())
        self._shapes = [
            (metric, tuple(name for name, _ in rules.labels), rules.labels)
            for metric, rules in metrics.items()
            if not rules.disabled
        ]

    def on_end(self, exchange: Exchange) -> None:
        """Count, log, and end the span."""
        bundle = self._sinks.metrics.standard(exchange)
        if self._standard:
            bundle.record(exchange)
        else:
            self._shaped(exchange, dict(zip(LABELS, bundle.labels, strict=True)))
        if REHEARSED in exchange.attributes or AUDITED in exchange.attributes:
            self._policies(exchange)
        for log in self._logs:
            if log.wanted is None or log.wanted(exchange) is True:
                self._sinks.write_line(log.path, log.line(exchange))
        tracing = self._tracing
        context: SpanContext | None = exchange.attributes.get(SPAN)
        if tracing is None or context is None or not (context.sampled and tracing.rules.report):
            return
        labels = dict(zip(LABELS, bundle.labels, strict=True))
        span = _span(exchange, context, tracing, labels)
        self._sinks.export_span(tracing.provider, span)

    def _policies(self, exchange: Exchange) -> None:
        """Count what policies in dry-run would have done, and what AUDIT policies noticed."""
        counts = self._sinks.policies
        for note in exchange.attributes.get(REHEARSED, ()):
            policy, _, effect = note.partition(" ")
            counts[policy, effect] += 1
        for policy in exchange.attributes.get(AUDITED, ()):
            counts[policy, "audited"] += 1

    def _shaped(self, exchange: Exchange, standard: Mapping[str, str]) -> None:
        values = {
            Metric.REQUEST_COUNT: 1.0,
            Metric.REQUEST_DURATION: (exchange.ended_s - exchange.started_s) * 1000,
            Metric.REQUEST_SIZE: float(exchange.request_bytes),
            Metric.RESPONSE_SIZE: float(exchange.response_bytes),
        }
        sent, received = exchange.request_messages, exchange.response_messages
        if sent is not None and received is not None:
            values[Metric.GRPC_REQUEST_MESSAGES] = float(sent.total)
            values[Metric.GRPC_RESPONSE_MESSAGES] = float(received.total)
        for metric, names, labels in self._shapes:
            if metric not in values:
                continue
            told = tuple(
                standard[name] if compute is None else _tag_value(compute(exchange))
                for name, compute in labels
            )
            self._sinks.metrics.shaped(metric, names, told, values[metric])


def _tag_value(found: object) -> str:
    if found is None or found == "":
        return UNKNOWN
    if isinstance(found, bool):
        return "true" if found else "false"
    return str(found)[:_MAX_VALUE_CHARS]


def _span(
    exchange: Exchange, context: SpanContext, tracing: Tracing, labels: Mapping[str, str]
) -> Span:
    request, response = exchange.request, exchange.response
    status = 0 if response is None else response.status
    destination = exchange.destination
    host = destination.service.hostname if destination.service else str(destination.authority)
    tags = {
        "component": "proxy",
        "http.method": request.method,
        "http.url": f"{request.scheme}://{request.authority}{request.path}",
        "http.status_code": str(status),
        "response_flags": flags_of(exchange),
        "request_size": str(exchange.request_bytes),
        "response_size": str(exchange.response_bytes),
        "peer.address": str(exchange.caller.address.ip),
        "user_agent": request.headers.get("user-agent") or "-",
        "guid:x-request-id": exchange.request_id or "-",
        "upstream_cluster": exchange.endpoint_service.hostname
        if exchange.endpoint_service
        else "-",
    }
    if tracing.rules.istio_tags:
        for end in ("source", "destination"):
            tags[f"istio.{end}_workload"] = labels[f"{end}_workload"]
            tags[f"istio.{end}_namespace"] = labels[f"{end}_workload_namespace"]
            tags[f"istio.{end}_canonical_service"] = labels[f"{end}_canonical_service"]
            tags[f"istio.{end}_canonical_revision"] = labels[f"{end}_canonical_revision"]
            tags[f"istio.{end}_cluster_id"] = labels[f"{end}_cluster"]
    if notes := exchange.attributes.get(REHEARSED):
        tags["istio.authorization.dry_run"] = "; ".join(notes)
    for name, read in tracing.rules.tags:
        tags[name] = str(read(exchange) or "")[:_MAX_VALUE_CHARS]
    return Span(
        context,
        f"{host}:{destination.port}/*",
        int(exchange.started_wall_s * 1e9),
        max(0, round((exchange.ended_s - exchange.started_s) * 1e9)),
        status >= _SERVER_ERROR or response is None,
        tuple(tags.items()),
        tracing.provider.name,
    )
