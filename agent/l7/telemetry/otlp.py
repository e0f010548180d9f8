"""Spans and log lines as an OpenTelemetry collector takes them, over gRPC or HTTP.

Requests can be put one behind the other: as one message they hold what both
held (https://protobuf.dev/programming-guides/encoding/#last-one-wins), so a
large batch can be encoded in turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from meshbpf.agent.l7.filter import Call, CallAnswer, CallFailed
from meshbpf.agent.l7.message import Headers, RequestHead
from meshbpf.agent.l7.providers import OtlpTracing
from meshbpf.agent.l7.telemetry.trace import Span, SpanContext, Tags
from meshbpf.agent.wire.grpc import GrpcError, encode, request_headers, status_of
from meshbpf.agent.wire.pb import otlp_pb2 as pb

TRACES_PATH = "/v1/traces"
LOGS_PATH = "/v1/logs"
"""Below a collector's URL (https://opentelemetry.io/docs/specs/otlp/#otlphttp-request)."""
RETRYABLE = frozenset({429, 502, 503, 504})
"""Statuses after which the same batch may be sent again (the same, "Retryable Response Codes")."""

_METHOD = "opentelemetry.proto.collector.trace.v1.TraceService/Export"
_SCOPE = "meshbpf"
_SAMPLED = 1
_SEVERITIES = {
    "debug": pb.SEVERITY_NUMBER_DEBUG,
    "info": pb.SEVERITY_NUMBER_INFO,
    "warn": pb.SEVERITY_NUMBER_WARN,
    "error": pb.SEVERITY_NUMBER_ERROR,
}


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One log line, for an exporter."""

    at_ns: int
    """Wall clock."""
    severity: str
    """`debug`, `info`, `warn` or `error`."""
    body: str
    tags: Tags
    context: SpanContext | None
    """The span that it belongs to."""


def export_call(provider: OtlpTracing, service: str, spans: Sequence[Span]) -> Call:
    """What to send. `service` names this waypoint."""
    message = export_request((("service.name", service),), spans).SerializeToString()
    host = str(provider.target)
    if provider.http_path:
        fields = [("content-type", "application/x-protobuf"), *provider.headers]
        head = RequestHead("POST", provider.http_path, host, _headers(fields))
        return Call(provider.target, head, message, provider.timeout_s)
    fields = request_headers(_METHOD, host, timeout_s=provider.timeout_s, metadata=provider.headers)
    plain = [pair for pair in fields if not pair[0].startswith(":")]
    head = RequestHead("POST", f"/{_METHOD}", host, _headers(plain))
    return Call(provider.target, head, encode(message), provider.timeout_s, http2=True)


def export_failure(provider: OtlpTracing, answer: CallAnswer | CallFailed) -> str:
    """Why the collector did not take them; empty when it did."""
    if isinstance(answer, CallFailed):
        return answer.reason
    if provider.http_path:
        return "" if answer.head.status == 200 else f"it answered {answer.head.status}"
    fields = [(":status", str(answer.head.status)), *answer.head.headers.items()]
    status = status_of(_METHOD, fields)
    if status is None and answer.head.trailers is not None:
        status = status_of(_METHOD, answer.head.trailers.items())
    if isinstance(status, GrpcError):
        return status.what
    return "" if status is not None else "it ended the call without a status"


def export_request(resource: Tags, spans: Sequence[Span]) -> pb.ExportTraceServiceRequest:
    """The message; `resource` says who we are."""
    request = pb.ExportTraceServiceRequest()
    batch = request.resource_spans.add()
    _attributes(batch.resource, resource)
    scope = batch.scope_spans.add()
    scope.scope.name = _SCOPE
    for span in spans:
        made = scope.spans.add()
        made.trace_id = bytes.fromhex(span.context.trace_id)
        made.span_id = bytes.fromhex(span.context.span_id)
        made.parent_span_id = bytes.fromhex(span.context.parent_id)
        made.name = span.name
        made.kind = pb.SPAN_KIND_CLIENT if span.client else pb.SPAN_KIND_SERVER
        made.start_time_unix_nano = span.started_ns
        made.end_time_unix_nano = span.started_ns + span.duration_ns
        _attributes(made, span.tags)
        if span.failed:
            made.status.code = pb.STATUS_CODE_ERROR
    return request


def logs_request(resource: Tags, entries: Sequence[LogEntry]) -> pb.ExportLogsServiceRequest:
    """The same for log lines."""
    request = pb.ExportLogsServiceRequest()
    batch = request.resource_logs.add()
    _attributes(batch.resource, resource)
    scope = batch.scope_logs.add()
    scope.scope.name = _SCOPE
    for entry in entries:
        made = scope.log_records.add()
        made.time_unix_nano = made.observed_time_unix_nano = entry.at_ns
        made.severity_number = _SEVERITIES[entry.severity]
        made.severity_text = entry.severity
        made.body.string_value = entry.body
        _attributes(made, entry.tags)
        if entry.context is not None:
            made.trace_id = bytes.fromhex(entry.context.trace_id)
            made.span_id = bytes.fromhex(entry.context.span_id)
            made.flags = _SAMPLED if entry.context.sampled else 0
    return request


def rejected(body: bytes) -> tuple[int, str]:
    """How many items of a batch a collector did not take, and why, by its answer with 200.

    Spans and log lines have the same answer. ValueError for what is none.
    """
    try:
        found = pb.ExportTraceServiceResponse.FromString(body).partial_success
    except DecodeError as error:
        raise ValueError(str(error)) from error
    return max(0, found.rejected), found.error_message


def _attributes(into: pb.Resource | pb.Span | pb.LogRecord, tags: Tags) -> None:
    for name, value in tags:
        made = into.attributes.add()
        made.key = name
        if isinstance(value, int):
            made.value.int_value = value
        else:
            made.value.string_value = value


def _headers(fields: Sequence[tuple[str, str]]) -> Headers:
    return Headers((name.encode(), value.encode("latin-1", "replace")) for name, value in fields)
