"""Spans as an OpenTelemetry collector takes them: one call for a batch, over gRPC or HTTP."""

from __future__ import annotations

from collections.abc import Sequence

from meshbpf.agent.l7.filter import Call, CallAnswer, CallFailed
from meshbpf.agent.l7.message import Headers, RequestHead
from meshbpf.agent.l7.providers import OtlpTracing
from meshbpf.agent.l7.telemetry.trace import Span
from meshbpf.agent.wire.grpc import GrpcError, encode, request_headers, status_of
from meshbpf.agent.wire.pb import otlp_pb2 as pb

_METHOD = "opentelemetry.proto.collector.trace.v1.TraceService/Export"


def export_call(provider: OtlpTracing, service: str, spans: Sequence[Span]) -> Call:
    """What to send. `service` names this waypoint."""
    message = export_request(service, spans).SerializeToString()
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


def export_request(service: str, spans: Sequence[Span]) -> pb.ExportTraceServiceRequest:
    """The message."""
    request = pb.ExportTraceServiceRequest()
    batch = request.resource_spans.add()
    _attribute(batch.resource.attributes.add(), "service.name", service)
    scope = batch.scope_spans.add()
    scope.scope.name = "meshbpf"
    for span in spans:
        made = scope.spans.add()
        made.trace_id = bytes.fromhex(span.context.trace_id)
        made.span_id = bytes.fromhex(span.context.span_id)
        made.parent_span_id = bytes.fromhex(span.context.parent_id)
        made.name = span.name
        made.kind = pb.SPAN_KIND_SERVER
        made.start_time_unix_nano = span.started_ns
        made.end_time_unix_nano = span.started_ns + span.duration_ns
        for name, value in span.tags:
            _attribute(made.attributes.add(), name, value)
        if span.failed:
            made.status.code = pb.STATUS_CODE_ERROR
    return request


def _attribute(into: pb.KeyValue, key: str, value: str) -> None:
    into.key, into.value.string_value = key, value


def _headers(fields: Sequence[tuple[str, str]]) -> Headers:
    return Headers((name.encode(), value.encode("latin-1", "replace")) for name, value in fields)
