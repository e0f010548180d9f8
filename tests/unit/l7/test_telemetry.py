"""What is told of a request: labels, buckets, lines, spans, and how Telemetry shapes them."""

from __future__ import annotations

import json
import random
import time
from ipaddress import ip_address
from typing import Any

import pytest

from meshbpf.agent.core.address import SocketAddress
from meshbpf.agent.core.objects import KubeObject, ObjectKey
from meshbpf.agent.core.workload import Workload
from meshbpf.agent.l7.exchange import Caller, Connection, Exchange, Flag, Protocol
from meshbpf.agent.l7.filter import CONTINUE, Chain
from meshbpf.agent.l7.message import Headers, ResponseHead
from meshbpf.agent.l7.problem import Problem
from meshbpf.agent.l7.providers import OtlpTracing
from meshbpf.agent.l7.telemetry.filter import Sinks
from meshbpf.agent.l7.telemetry.log_format import compile_json, compile_text
from meshbpf.agent.l7.telemetry.request_metrics import (
    BUCKETS,
    LABELS,
    Metric,
    RequestMetrics,
    Sample,
)
from meshbpf.agent.l7.telemetry.source import SINKS, telemetry
from meshbpf.agent.l7.telemetry.trace import Span, begin_span, propagate, read_parent
from meshbpf.agent.runtime.exposition import render
from meshbpf.agent.runtime.waypoint.request_families import policy_families
from tests.unit.l7.samples import ECHO, a_connection, a_scope, an_exchange, an_object

WEB = Workload(
    "web", "web-1", "shop", canonical_name="web", canonical_revision="v1", workload_name="web"
)
POD = Workload(
    "echo",
    "echo-1",
    "shop",
    service_account="echo",
    canonical_name="echo",
    canonical_revision="v2",
    workload_name="echo-v2",
)


def done(
    status: int = 200,
    *,
    headers: dict[str, str] | None = None,
    response: dict[str, str] | None = None,
    path: str = "/a?b=c",
    **more: Any,
) -> Exchange:
    """A request that was answered after 42 ms."""
    plain = a_connection()
    caller = Caller(plain.caller.identity, plain.caller.address, WEB)
    connection = Connection(caller, plain.destination, plain.protocol)
    exchange = an_exchange("GET", path, "echo:80", headers, connection=connection)
    raw = [(k.encode(), v.encode("latin-1")) for k, v in (response or {}).items()]
    exchange.response = ResponseHead(status, Headers(raw))
    exchange.endpoint, exchange.endpoint_service = POD, ECHO
    exchange.endpoint_address = SocketAddress(ip_address("198.18.2.2"), 8080)
    exchange.route, exchange.attempts, exchange.detail = "shop/echo/0", 1, "via_upstream"
    exchange.request_id = "r-1"
    exchange.request_bytes, exchange.response_bytes = 5, 700
    exchange.first_byte_s, exchange.ended_s = 10.030, 10.042
    for name, value in more.items():
        setattr(exchange, name, value)
    return exchange


class Told:
    """The sinks of a process, and what came to them."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self.spans: list[tuple[OtlpTracing, Span]] = []
        self.sinks = Sinks(
            write_line=lambda path, line: self.lines.append((path, line)),
            export_span=lambda provider, span: self.spans.append((provider, span)),
            rng=random.Random(7),
        )
        self.problems: list[Problem] = []

    def chain(self, *objects: KubeObject) -> Chain:
        scope = a_scope(*objects)
        scope.keep[SINKS] = self.sinks
        filters, self.problems = telemetry(scope)
        return Chain.of(filters)

    def run(self, chain: Chain, *exchanges: Exchange) -> None:
        for exchange in exchanges:
            assert [hook(exchange) for hook in chain.request] == [CONTINUE] * len(chain.request)
            for end in chain.end:
                end(exchange)

    def samples(self, metric: Metric) -> list[Sample]:
        return [each for each in self.sinks.metrics.samples() if each.metric is metric]


@pytest.fixture
def told() -> Told:
    return Told()


def labels(sample: Sample) -> dict[str, str]:
    return dict(zip(sample.names, sample.values, strict=True))


def test_the_labels_are_istios_with_the_waypoint_as_reporter(told: Told) -> None:
    told.run(told.chain(), done())
    (sample,) = told.samples(Metric.REQUEST_COUNT)
    assert sample.count == 1
    assert labels(sample) == {
        "reporter": "waypoint",
        "source_workload": "web",
        "source_canonical_service": "web",
        "source_canonical_revision": "v1",
        "source_workload_namespace": "shop",
        "source_principal": "spiffe://cluster.local/ns/shop/sa/web",
        "source_app": "web",
        "source_version": "v1",
        "source_cluster": "Kubernetes",
        "destination_workload": "echo-v2",
        "destination_canonical_service": "echo",
        "destination_canonical_revision": "v2",
        "destination_workload_namespace": "shop",
        "destination_principal": "spiffe://cluster.local/ns/shop/sa/echo",
        "destination_app": "echo",
        "destination_version": "v2",
        "destination_cluster": "Kubernetes",
        "destination_service": "echo.shop.svc.cluster.local",
        "destination_service_name": "echo",
        "destination_service_namespace": "shop",
        "request_protocol": "http",
        "response_code": "200",
        "grpc_response_status": "",
        "response_flags": "-",
        "connection_security_policy": "mutual_tls",
    }


def test_a_request_that_reached_nobody_is_told_with_its_flags(told: Told) -> None:
    exchange = done(503, flags=[Flag.NO_HEALTHY_UPSTREAM], endpoint=None, endpoint_service=None)
    told.run(told.chain(), exchange)
    found = labels(told.samples(Metric.REQUEST_COUNT)[0])
    assert found["response_flags"] == "UH"
    assert found["destination_workload"] == "unknown"
    assert found["destination_service"] == "echo.shop.svc.cluster.local"


def test_grpc_is_told_with_its_status(told: Told) -> None:
    exchange = done(200, protocol=Protocol.GRPC)
    assert exchange.response is not None
    exchange.response.trailers = Headers([(b"grpc-status", b"7")])
    told.run(told.chain(), exchange)
    found = labels(told.samples(Metric.REQUEST_COUNT)[0])
    assert (found["request_protocol"], found["grpc_response_status"]) == ("grpc", "7")


def test_grpc_messages_are_counted_however_they_are_cut(told: Told) -> None:
    stream = b"".join(bytes(1) + len(body).to_bytes(4, "big") + body for body in (b"", b"x" * 9))
    for step in (1, 2, 7, 99):
        exchange = done(200, protocol=Protocol.GRPC)
        exchange.__post_init__()
        for at in range(0, len(stream), step):
            exchange.count_request(stream[at : at + step])
        exchange.count_response(stream)
        exchange.count_response(stream)
        told.run(told.chain(), exchange)
    (sent,) = told.samples(Metric.GRPC_REQUEST_MESSAGES)
    (received,) = told.samples(Metric.GRPC_RESPONSE_MESSAGES)
    assert (sent.count, received.count) == (8, 16)


def test_requests_without_grpc_have_no_messages(told: Told) -> None:
    told.run(told.chain(), done())
    assert list(told.samples(Metric.GRPC_REQUEST_MESSAGES)) == []


def test_a_peers_text_does_not_become_a_label(told: Told) -> None:
    exchange = done(200, protocol=Protocol.GRPC, response={"grpc-status": "a" * 999})
    told.run(told.chain(), exchange)
    assert labels(told.samples(Metric.REQUEST_COUNT)[0])["grpc_response_status"] == "unknown"


def test_durations_and_sizes_fall_into_envoys_buckets(told: Told) -> None:
    told.run(told.chain(), done(), done())
    (duration,) = told.samples(Metric.REQUEST_DURATION)
    assert duration.histogram is not None
    assert dict(zip(BUCKETS, duration.histogram.counts, strict=False))[50] == 2
    assert duration.histogram.observed == 2
    assert duration.histogram.total == pytest.approx(84)
    (size,) = told.samples(Metric.RESPONSE_SIZE)
    assert size.histogram is not None
    assert size.histogram.total == 1400


def test_past_the_bound_requests_are_counted_without_labels() -> None:
    metrics = RequestMetrics(max_series=2)
    for status in (200, 201, 202, 203):
        metrics.standard(done(status)).record(done(status))
    found = [each for each in metrics.samples() if each.metric is Metric.REQUEST_COUNT]
    assert sorted(each.count for each in found) == [1, 1, 2]
    assert metrics.overflowed == 2
    unknown = next(labels(each) for each in found if each.count == 2)
    assert set(unknown.values()) == {"waypoint", "unknown"}


def test_another_workload_at_the_same_address_in_memory_is_not_taken_for_the_first() -> None:
    metrics = RequestMetrics()
    names = set()
    for index in range(200):
        exchange = done()
        exchange.endpoint = Workload(f"u{index}", "p", "shop", workload_name=f"w{index}")
        names.add(metrics.standard(exchange).labels[LABELS.index("destination_workload")])
    assert len(names) == 200


# --- the access log


def test_the_default_line_is_envoys() -> None:
    exchange = done(
        403,
        headers={"user-agent": "curl/8", "x-forwarded-for": "10.1.1.1"},
        detail="rbac_access_denied_matched_policy[none]",
        flags=[Flag.UNAUTHORIZED_EXTERNAL],
    )
    assert compile_text()(exchange) == (
        '[2026-09-21T14:13:20.000Z] "GET /a?b=c HTTP/1.1" 403 UAEX '
        'rbac_access_denied_matched_policy[none] - "-" 5 700 42 30 "10.1.1.1" "curl/8" '
        '"r-1" "echo:80" "198.18.2.2:8080" echo.shop.svc.cluster.local - 198.18.9.9:80 '
        "198.18.1.1:40000 - shop/echo/0\n"
    )


def test_a_client_cannot_forge_a_line() -> None:
    exchange = done(headers={"user-agent": 'x" 200\n[forged]\x1b[2J\\'})
    line = compile_text('"%REQ(USER-AGENT)%"')(exchange)
    assert line == '"x\\" 200\\x0a[forged]\\x1b[2J\\\\"\n'


def test_json_has_istios_fields_and_numbers_as_numbers() -> None:
    record = json.loads(compile_json()(done(headers={"user-agent": 'a"\n'})))
    assert len(record) == 24
    assert record["response_code"] == 200
    assert record["duration"] == 42
    assert record["user_agent"] == 'a"\n'
    assert record["requested_server_name"] is None
    assert record["upstream_host"] == "198.18.2.2:8080"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("%REQ(X-A?USER-AGENT)%", "ua"),
        ("%REQ(USER-AGENT):1%", "u"),
        ("%RESP(server)% %%", "s %"),
        ("%START_TIME(%Y-%m-%d %H:%M:%S.%3f)%", "2026-09-21 14:13:20.000"),
        ("%GRPC_STATUS%", "-"),
        ("%DOWNSTREAM_PEER_URI_SAN%", "spiffe://cluster.local/ns/shop/sa/web"),
    ],
)
def test_operators(text: str, line: str) -> None:
    exchange = done(headers={"user-agent": "ua"}, response={"server": "s"})
    assert compile_text(text)(exchange) == line + "\n"


def test_an_unknown_operator_is_told() -> None:
    with pytest.raises(ValueError, match="%NOPE% is not an operator"):
        compile_text("%NOPE%")


MESH = """
extensionProviders:
- name: json
  envoyFileAccessLog: {logFormat: {labels: {code: "%RESPONSE_CODE%", who: "%REQ(X-WHO)%"}}}
- name: collector
  opentelemetry: {service: otel.example, port: 4317}
- name: other
  zipkin: {service: z, port: 1}
"""


def mesh(text: str = MESH) -> KubeObject:
    key = ObjectKey("", "ConfigMap", "istio-system", "istio")
    return KubeObject(key, "v1", {"data": {"mesh": text}}, "mesh.yaml:1")


def rule(name: str = "t", *, namespace: str = "shop", **spec: Any) -> KubeObject:
    return an_object("telemetry.istio.io", "Telemetry", name, spec, namespace=namespace)


def log_rule(provider: str = "envoy", **more: Any) -> dict[str, Any]:
    return {"providers": [{"name": provider}], **more}


def test_by_default_nothing_is_logged(told: Told) -> None:
    told.run(told.chain(), done())
    assert told.lines == []


def test_the_mesh_configuration_turns_the_log_on(told: Told) -> None:
    told.run(told.chain(mesh("{accessLogFile: /dev/stdout, accessLogEncoding: JSON}")), done())
    ((path, line),) = told.lines
    assert path == "/dev/stdout"
    assert json.loads(line)["response_code"] == 200
    told.lines.clear()
    told.run(told.chain(mesh("{accessLogFile: /x, accessLogFormat: '%PROTOCOL%'}")), done())
    assert told.lines == [("/x", "HTTP/1.1\n")]


def test_telemetry_names_a_provider_and_filters(told: Told) -> None:
    wanted = {"expression": "response.code >= 400 && request.headers['x-who'] != 'probe'"}
    chain = told.chain(mesh(), rule(accessLogging=[log_rule("json", filter=wanted)]))
    told.run(
        chain,
        done(200),
        done(404, headers={"x-who": "a"}),
        done(404, headers={"x-who": "probe"}),
        done(404),  # without the header the expression fails, and so does not hold
    )
    assert [json.loads(line) for _, line in told.lines] == [{"code": 404, "who": "a"}]


@pytest.mark.parametrize(
    ("expression", "holds"),
    [
        ("request.duration > duration('40ms')", True),
        ("request.duration > duration('50ms')", False),
        ("request.url_path == '/a' && request.method == 'GET'", True),
        ("connection.mtls", True),
        ("connection.uri_san_peer_certificate.contains('/ns/shop/')", True),
        ("has(response.code) && response.flags == '-'", True),
        ("response.code", False),  # no truth
    ],
)
def test_expressions_read_envoys_attributes(told: Told, expression: str, holds: bool) -> None:
    chain = told.chain(rule(accessLogging=[log_rule(filter={"expression": expression})]))
    assert told.problems == []
    told.run(chain, done())
    assert bool(told.lines) is holds


def test_the_narrower_telemetry_wins(told: Told) -> None:
    wide = rule("wide", namespace="istio-system", accessLogging=[log_rule()])
    target = [{"kind": "Service", "name": "echo"}]
    narrow = rule("narrow", targetRefs=target, accessLogging=[log_rule(disabled=True)])
    told.run(told.chain(wide), done())
    assert len(told.lines) == 1
    told.run(told.chain(narrow, wide), done())
    assert len(told.lines) == 1
    elsewhere = rule("x", namespace="bank", accessLogging=[log_rule(disabled=True)])
    client = rule("y", accessLogging=[log_rule(disabled=True, match={"mode": "CLIENT"})])
    told.run(told.chain(wide, elsewhere, client), done())
    assert len(told.lines) == 2


# --- metric overrides


def metric_rule(**override: Any) -> KubeObject:
    return rule(metrics=[{"overrides": [override]}])


def test_a_metric_can_be_disabled(told: Told) -> None:
    told.run(told.chain(metric_rule(match={"metric": "REQUEST_SIZE"}, disabled=True)), done())
    assert told.samples(Metric.REQUEST_SIZE) == []
    assert told.samples(Metric.REQUEST_COUNT)[0].count == 1


def test_tags_are_added_computed_and_removed(told: Told) -> None:
    tags = {
        "source_principal": {"operation": "REMOVE"},
        "host": {"value": "request.host"},
        "gone": {"value": "request.headers['nope']"},
        "destination_version": {"operation": "UPSERT", "value": "'v' + string(response.code)"},
    }
    match = {"metric": "REQUEST_COUNT"}
    told.run(told.chain(metric_rule(match=match, tagOverrides=tags)), done(), done())
    (sample,) = told.samples(Metric.REQUEST_COUNT)
    found = labels(sample)
    assert sample.count == 2
    assert "source_principal" not in found
    assert found["host"] == "echo:80"
    assert found["gone"] == "unknown"
    assert found["destination_version"] == "v200"
    assert "host" not in labels(told.samples(Metric.REQUEST_SIZE)[0])


# --- spans

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize(
    ("header", "good"),
    [
        (PARENT, True),
        (PARENT[:-2] + "00", True),
        ("01" + PARENT[2:] + "-more", True),
        (PARENT + "-more", False),
        ("ff" + PARENT[2:], False),
        ("00-" + "0" * 32 + PARENT[35:], False),
        (PARENT[:36] + "0" * 16 + "-01", False),
        (PARENT.upper(), False),
        ("", False),
    ],
)
def test_a_traceparent_is_read_as_the_specification_says(header: str, good: bool) -> None:
    found = read_parent(Headers([(b"traceparent", header.encode())]))
    assert (found is not None) is good
    if found is not None:
        assert found.sampled is header.rstrip("-more").endswith("01")


def test_a_clients_decision_to_sample_holds() -> None:
    rng = random.Random(1)
    headers = Headers([(b"traceparent", PARENT.encode()), (b"tracestate", b"a=b")])
    span = begin_span(headers, rng, 0)
    assert (span.trace_id, span.parent_id, span.sampled) == (PARENT[3:35], PARENT[36:52], True)
    propagate(headers, span)
    assert headers.get("traceparent") == f"00-{PARENT[3:35]}-{span.span_id}-01"
    assert headers.get("tracestate") == "a=b"
    unsampled = Headers([(b"traceparent", (PARENT[:-2] + "00").encode())])
    assert not begin_span(unsampled, rng, 100).sampled


def test_without_a_parent_a_share_is_sampled() -> None:
    rng = random.Random(1)
    drawn = [begin_span(Headers(), rng, 25).sampled for _ in range(2000)]
    assert 0.2 < sum(drawn) / len(drawn) < 0.3


TRACED = {
    "providers": [{"name": "collector"}],
    "randomSamplingPercentage": 100,
    "customTags": {
        "team": {"literal": {"value": "red"}},
        "who": {"header": {"name": "X-Who", "defaultValue": "nobody"}},
        "code": {"formatter": {"value": "c%RESPONSE_CODE%"}},
    },
}


def test_a_span_goes_to_its_provider_with_its_tags(told: Told) -> None:
    chain = told.chain(mesh(), rule(tracing=[TRACED]))
    assert told.problems == []
    exchange = done(503)
    told.run(chain, exchange)
    ((provider, span),) = told.spans
    assert str(provider.target) == "otel.example:4317"
    assert span.name == "echo.shop.svc.cluster.local:80/*"
    assert span.duration_ns == pytest.approx(42_000_000, abs=10)
    assert span.failed
    tags = dict(span.tags)
    assert (tags["team"], tags["who"], tags["code"]) == ("red", "nobody", "c503")
    assert tags["istio.destination_workload"] == "echo-v2"
    assert tags["http.url"] == "http://echo:80/a?b=c"
    sent = exchange.request.headers.get("traceparent")
    assert sent == f"00-{span.context.trace_id}-{span.context.span_id}-01"


def test_reporting_and_propagation_can_be_turned_off(told: Told) -> None:
    quiet = {**TRACED, "disableSpanReporting": True}
    exchange = done()
    told.run(told.chain(mesh(), rule(tracing=[quiet])), exchange)
    assert told.spans == []
    assert "traceparent" in exchange.request.headers
    silent = {**TRACED, "disableContextPropagation": True}
    exchange = done()
    told.run(told.chain(mesh(), rule(tracing=[silent])), exchange)
    assert len(told.spans) == 1
    assert "traceparent" not in exchange.request.headers


def test_without_a_provider_a_traceparent_passes_as_it_came(told: Told) -> None:
    exchange = done(headers={"traceparent": PARENT})
    told.run(told.chain(), exchange)
    assert exchange.request.headers.get("traceparent") == PARENT


# --- bad objects

BAD: list[tuple[dict[str, Any], str]] = [
    ({"accesslogging": []}, "spec.accesslogging"),
    (
        {"accessLogging": [{"filter": {"expression": "1 +"}}]},
        "spec.accessLogging[0].filter.expression",
    ),
    (
        {"tracing": [{"randomSamplingPercentage": 101}]},
        "spec.tracing[0].randomSamplingPercentage",
    ),
    ({"tracing": [{"customTags": {"a": {}}}]}, "spec.tracing[0].customTags[a]"),
    (
        {"tracing": [{"customTags": {"a": {"formatter": {"value": "%NOPE%"}}}}]},
        "spec.tracing[0].customTags[a].formatter.value",
    ),
    (
        {"metrics": [{"overrides": [{"match": {"metric": "ALL"}}]}]},
        "spec.metrics[0].overrides[0].match.metric",
    ),
    (
        {"metrics": [{"overrides": [{"tagOverrides": {"a-b": {"value": "'x'"}}}]}]},
        "spec.metrics[0].overrides[0].tagOverrides[a-b]",
    ),
]


@pytest.mark.parametrize(("spec", "field"), BAD)
def test_a_bad_field_is_named(told: Told, spec: dict[str, Any], field: str) -> None:
    told.run(told.chain(rule(**spec)), done())
    assert [problem.field for problem in told.problems] == [field]


def test_a_provider_that_cannot_be_used_is_reported(told: Told) -> None:
    told.chain(mesh(), rule(accessLogging=[log_rule("nobody")], tracing=[log_rule("other")]))
    assert [problem.what for problem in told.problems] == [
        "no usable provider 'nobody' for FileLog",
        "no usable provider 'other' for OtlpTracing",
    ]


def test_counting_and_logging_a_request_take_a_twentieth_of_a_millisecond_at_most(
    told: Told,
) -> None:
    chain = told.chain(mesh("{accessLogFile: /dev/stdout}"))
    best = float("inf")
    for _ in range(5):
        exchanges = [done() for _ in range(200)]
        before = time.process_time()
        told.run(chain, *exchanges)
        best = min(best, (time.process_time() - before) / len(exchanges))
    assert best < 50e-6


def test_identity_decides_security_policy(told: Told) -> None:
    exchange = done()
    plain = Caller(None, exchange.caller.address, WEB)
    exchange.connection = Connection(plain, exchange.destination, Protocol.HTTP1)
    told.run(told.chain(), exchange)
    found = labels(told.samples(Metric.REQUEST_COUNT)[0])
    assert found["connection_security_policy"] == "none"
    assert found["source_principal"] == "unknown"


def test_dry_run_and_audit_are_counted_by_policy_and_effect(told: Told) -> None:
    exchange = done()
    exchange.attributes |= {
        "authz.dry_run": ("shop/p would deny", "shop/q would allow"),
        "authz.audited": ("shop/a",),
    }
    told.run(told.chain(mesh(), rule(tracing=[TRACED])), exchange, done())
    assert told.sinks.policies == {
        ("shop/p", "would deny"): 1,
        ("shop/q", "would allow"): 1,
        ("shop/a", "audited"): 1,
    }
    tags = dict(told.spans[0][1].tags)
    assert tags["istio.authorization.dry_run"] == "shop/p would deny; shop/q would allow"
    page = "".join(render(each, openmetrics=False) for each in policy_families(told.sinks.policies))
    assert 'meshbpf_waypoint_policy_notes_total{policy="shop/p",effect="would deny"} 1' in page
