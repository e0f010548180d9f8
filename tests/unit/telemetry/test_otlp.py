"""Access logs and connection spans at a collector, and what happens while there is none."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
import trio
import trio.testing

from meshbpf.agent.config import otlp_endpoint
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.traffic import Reporter
from meshbpf.agent.runtime import otlp_export
from meshbpf.agent.runtime.connections import LiveConnection
from meshbpf.agent.runtime.exposition import render
from meshbpf.agent.runtime.otlp_export import BATCH_ITEMS, QUEUE_ITEMS, OtlpExporter
from meshbpf.agent.runtime.otlp_post import Collector, CollectorError, Posted
from meshbpf.agent.runtime.telemetry import Telemetry
from meshbpf.agent.wire.pb import otlp_pb2 as pb
from tests.unit.kube.api_server import certificates
from tests.unit.telemetry import samples
from tests.unit.telemetry.collector import attributes, collecting

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-"
TRACE_ID, PARENT_ID = PARENT[3:35], PARENT[36:52]


@pytest.fixture(autouse=True)
def _levels() -> Iterator[None]:
    access = logging.getLogger("access")
    level, handlers = access.level, access.handlers[:]
    access.setLevel(logging.INFO)
    yield
    access.setLevel(level)
    access.handlers[:] = handlers


@dataclass(slots=True, eq=False)
class Scripted:
    """A collector whose answers are given, for tests that turn the clock."""

    answers: list[int | CollectorError] = field(default_factory=list)
    """One after the other; the last one stays."""
    body: bytes = b""
    posts: list[tuple[float, str, bytes]] = field(default_factory=list)

    async def post(self, path: str, body: bytes) -> Posted:
        await trio.lowlevel.checkpoint()
        self.posts.append((trio.current_time(), path, body))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, CollectorError):
            raise answer
        return Posted(answer, self.body)

    def span_batches(self) -> list[int]:
        return [
            sum(
                len(scope.spans)
                for resource in pb.ExportTraceServiceRequest.FromString(body).resource_spans
                for scope in resource.scope_spans
            )
            for _at, path, body in self.posts
            if path == "/v1/traces"
        ]


def to(url: str, timeout_s: float = 5.0) -> Collector:
    endpoint = otlp_endpoint(url)
    assert endpoint is not None
    return Collector(endpoint, timeout_s)


@asynccontextmanager
async def exporting(collector: Collector | Scripted) -> AsyncIterator[OtlpExporter]:
    exporter = OtlpExporter(collector, "node1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(exporter.run)
        await trio.testing.wait_all_tasks_blocked()
        yield exporter
        nursery.cancel_scope.cancel()


def end(telemetry: Telemetry, live: LiveConnection, traceparent: str = "") -> None:
    """A connection's whole life."""
    live.trace = telemetry.trace(traceparent)
    telemetry.opened(live)
    live.sent.total, live.received.total = 84, 175
    telemetry.closed(live)


def numbers(exporter: OtlpExporter) -> dict[str, float]:
    """The samples of /metrics."""
    text = "".join(render(family, openmetrics=False) for family in exporter.families())
    rows = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name.removeprefix("meshbpf_otlp_records_"): float(value) for name, _, value in rows}


async def test_a_connection_s_line_and_span_say_the_same_and_name_each_other() -> None:
    async with collecting() as collector, exporting(to(collector.url)) as exporter:
        end(Telemetry(monotonic=lambda: 0.0345, exporter=exporter), samples.outbound())
        await exporter.finish()
    (line,), (span,) = collector.lines(), collector.spans()
    assert (line.body.string_value, line.severity_text) == ("connection complete", "info")
    assert line.severity_number == pb.SEVERITY_NUMBER_INFO
    assert (line.trace_id, line.span_id, line.flags) == (span.trace_id, span.span_id, 1)
    assert (span.name, span.kind) == ("outbound HBONE", pb.SPAN_KIND_CLIENT)
    assert span.end_time_unix_nano - span.start_time_unix_nano == 34_500_000
    assert span.status.code == pb.STATUS_CODE_UNSET
    assert attributes(line) == attributes(span)
    found = attributes(line)
    assert found["src.workload"] == "web-0"
    assert found["dst.service"] == "db.stock.svc.cluster.local"
    assert (found["bytes_sent"], found["bytes_recv"]) == (84, 175)
    assert "error" not in found
    for path, headers, body in collector.requests:
        assert headers["content-type"] == "application/x-protobuf"
        kind = pb.ExportLogsServiceRequest if path == "/v1/logs" else pb.ExportTraceServiceRequest
        message = kind.FromString(body)
        (resource,) = getattr(message, "resource_logs", None) or message.resource_spans
        told = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
        assert (told["service.name"], told["k8s.node.name"]) == ("meshbpf", "node1")
    assert numbers(exporter)['exported_total{signal="logs"}'] == 1
    assert numbers(exporter)['exported_total{signal="spans"}'] == 1


@pytest.mark.compat
async def test_both_ends_of_a_connection_are_spans_of_one_trace() -> None:
    async with collecting() as collector, exporting(to(collector.url)) as exporter:
        telemetry = Telemetry(exporter=exporter)
        client = samples.outbound()
        end(telemetry, client)
        assert client.trace is not None
        assert client.trace.header.endswith("-01")
        end(telemetry, samples.inbound(), client.trace.header)
        await exporter.finish()
    ours, theirs = collector.spans()
    assert theirs.trace_id == ours.trace_id
    assert theirs.parent_span_id == ours.span_id
    assert not ours.parent_span_id
    assert theirs.span_id not in (ours.span_id, b"")
    assert (theirs.name, theirs.kind) == ("inbound HBONE", pb.SPAN_KIND_SERVER)


@pytest.mark.parametrize(
    ("header", "trace_id", "parent_id"),
    [
        (f"{PARENT}01", TRACE_ID, PARENT_ID),
        (f"{PARENT}00", TRACE_ID, ""),
    ],
)
def test_a_client_without_a_span_of_its_own_gives_the_trace_alone(
    header: str, trace_id: str, parent_id: str
) -> None:
    context = OtlpExporter(Scripted([200]), "n").begin(header)
    assert (context.trace_id, context.parent_id, context.sampled) == (trace_id, parent_id, True)


@pytest.mark.parametrize("header", ["", "\udcff", "00-x-y-01", f"00-{'0' * 32}-{PARENT_ID}-01"])
def test_a_traceparent_that_means_nothing_begins_a_trace(header: str) -> None:
    context = OtlpExporter(Scripted([200]), "n").begin(header)
    assert len(context.trace_id) == 32
    assert int(context.trace_id, 16)
    assert not context.parent_id


def test_without_an_exporter_a_connection_has_no_span() -> None:
    assert Telemetry().trace(f"{PARENT}01") is None


async def test_a_failed_connection_is_an_error_in_both() -> None:
    live = samples.outbound()
    live.fail(MeshbpfError("connect-failed", "connection refused by \udcff"))
    async with collecting() as collector, exporting(to(collector.url)) as exporter:
        end(Telemetry(exporter=exporter), live)
        await exporter.finish()
    (line,), (span,) = collector.lines(), collector.spans()
    assert line.severity_number == pb.SEVERITY_NUMBER_ERROR
    assert span.status.code == pb.STATUS_CODE_ERROR
    assert attributes(span)["error"] == "connection refused by ?"


async def test_what_is_refused_before_its_workload_is_known_is_a_line_alone() -> None:
    async with collecting() as collector, exporting(to(collector.url)) as exporter:
        Telemetry(exporter=exporter).denied_early(
            Reporter.DESTINATION,
            samples.address("198.18.7.7:1"),
            samples.address("198.18.2.1:15008"),
            MeshbpfError("tls-handshake", "no certificate"),
        )
        await exporter.finish()
    (line,) = collector.lines()
    assert (line.severity_text, line.trace_id) == ("warn", b"")
    assert attributes(line)["error"] == "no certificate"
    assert not collector.spans()


async def test_what_the_access_log_does_not_write_is_not_sent() -> None:
    logging.getLogger("access").setLevel(logging.CRITICAL)
    async with collecting() as collector, exporting(to(collector.url)) as exporter:
        end(Telemetry(exporter=exporter), samples.outbound())
        await exporter.finish()
    assert not collector.lines()
    assert len(collector.spans()) == 1


async def test_the_url_s_path_comes_before_the_protocol_s() -> None:
    async with collecting() as collector, exporting(to(f"{collector.url}/otel/")) as exporter:
        end(Telemetry(exporter=exporter), samples.outbound())
        await exporter.finish()
    paths = sorted(path for path, _headers, _body in collector.requests)
    assert paths == ["/otel/v1/logs", "/otel/v1/traces"]


async def test_batches_are_bounded_and_leave_in_order(
    autojump_clock: trio.testing.MockClock,
) -> None:
    collector = Scripted([200])
    async with exporting(collector) as exporter:
        telemetry = Telemetry(exporter=exporter)
        for number in range(BATCH_ITEMS + 3):
            end(telemetry, samples.outbound(number))
        await trio.sleep(otlp_export.QUEUE_S * 1.5)
    assert collector.span_batches() == [BATCH_ITEMS, 3]


async def test_a_collector_that_is_away_is_tried_ever_later_and_then_gets_everything(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    away: list[int | CollectorError] = [CollectorError("refused") for _ in range(4)]
    collector = Scripted([*away, 503, 429, 200])
    exporter = OtlpExporter(collector, "n")
    put_spans(exporter, 3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(exporter.run)
        await trio.sleep(120)
        nursery.cancel_scope.cancel()
    times = [at for at, _path, _body in collector.posts]
    pauses = [after - before for before, after in pairwise(times)]
    assert len(times) == 7
    for pause, about in zip(pauses, (1, 2, 4, 8, 16, 30), strict=True):
        assert about * 0.79 < pause < about * 1.21
    assert collector.span_batches() == [3] * 7  # the same ones
    found = numbers(exporter)
    assert (found['exported_total{signal="spans"}'], found['dropped_total{signal="spans"}']) == (
        3,
        0,
    )
    warnings = [each for each in caplog.records if each.name == "meshbpf.otlp"]
    assert len(warnings) == 1  # and not one for each attempt


def put_spans(exporter: OtlpExporter, count: int) -> None:
    for number in range(count):
        live = samples.outbound(number)
        live.trace = exporter.begin()
        exporter.ended(live, {}, 0.5)


async def test_a_full_queue_drops_what_comes_and_counts_it_without_waiting() -> None:
    exporter = OtlpExporter(Scripted([200]), "n")
    telemetry = Telemetry(exporter=exporter)
    for number in range(QUEUE_ITEMS + 10):
        end(telemetry, samples.outbound(number))  # no turn of the event loop in between
    found = numbers(exporter)
    assert found['queued{signal="spans"}'] == QUEUE_ITEMS
    assert found['dropped_total{signal="spans"}'] == 10


@pytest.mark.parametrize(
    ("status", "body", "dropped"),
    [
        (400, b"", 3),
        (404, b"", 3),
        (200, b"\xff\xff", 0),
        (200, pb.ExportTraceServiceResponse().SerializeToString(), 0),
        (
            200,
            pb.ExportTraceServiceResponse(
                partial_success=pb.ExportPartialSuccess(rejected=2, error_message="too old")
            ).SerializeToString(),
            2,
        ),
        (
            200,
            pb.ExportTraceServiceResponse(
                partial_success=pb.ExportPartialSuccess(rejected=1 << 40)
            ).SerializeToString(),
            3,
        ),
    ],
)
async def test_what_a_collector_refuses_for_good_is_dropped_and_counted(
    autojump_clock: trio.testing.MockClock, status: int, body: bytes, dropped: int
) -> None:
    collector = Scripted([status], body)
    async with exporting(collector) as exporter:
        put_spans(exporter, 3)
        await trio.sleep(5)
    assert len(collector.posts) == 1
    found = numbers(exporter)
    assert found['dropped_total{signal="spans"}'] == dropped
    assert found['exported_total{signal="spans"}'] == 3 - dropped
    assert found['queued{signal="spans"}'] == 0


async def test_a_stop_does_not_wait_for_a_silent_collector() -> None:
    async with collecting() as collector, exporting(to(collector.url)) as exporter:
        collector.silent = True
        put_spans(exporter, 1)
        begun = trio.current_time()
        await exporter.finish()
        assert trio.current_time() - begun < otlp_export.FINISH_S + 0.5


async def test_a_stop_counts_what_no_collector_took() -> None:
    async with exporting(Scripted([CollectorError("away")])) as exporter:
        put_spans(exporter, 1)
        await exporter.finish()
    assert numbers(exporter)['dropped_total{signal="spans"}'] == 1


# --- one post -------------------------------------------------------------------


async def test_a_silent_collector_costs_the_timeout_and_no_more() -> None:
    async with collecting() as collector:
        collector.silent = True
        with pytest.raises(CollectorError, match=r"no answer in 0\.2 s"):
            await to(collector.url, 0.2).post("/v1/logs", b"")


async def test_where_nothing_listens_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and not listening
        port = taken.getsockname()[1]
        with pytest.raises(CollectorError, match=f"127.0.0.1:{port}: .*refused"):
            await to(f"http://127.0.0.1:{port}").post("/v1/logs", b"")


@pytest.mark.parametrize(
    "answer", [b"", b"SSH-2.0\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf"]
)
async def test_what_is_no_answer_in_http_is_an_error_of_the_collector(answer: bytes) -> None:
    async def odd(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some(65536)
            await stream.send_all(answer)

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, odd, [listener])
        with pytest.raises(CollectorError):
            await to(f"http://127.0.0.1:{listener.socket.getsockname()[1]}").post("/x", b"a")
        nursery.cancel_scope.cancel()


async def test_an_endless_answer_is_not_read_to_its_end() -> None:
    async with collecting() as collector:
        collector.body = b"x" * 1_000_000
        with pytest.raises(CollectorError, match="more than"):
            await to(collector.url).post("/v1/logs", b"")


async def test_over_https_the_collector_must_prove_who_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots, context = certificates(tmp_path)
    async with collecting(context) as collector:
        url = collector.url.replace("http:", "https:")
        with pytest.raises(CollectorError, match="CERTIFICATE_VERIFY_FAILED"):
            await to(url).post("/v1/logs", b"")
        assert not collector.requests
        (tmp_path / "roots.pem").write_bytes(roots)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "roots.pem"))
        assert (await to(url).post("/v1/logs", b"")).status == 200
    assert len(collector.requests) == 1


# --- the url --------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "otel:4318",
        "http://otel",
        "http://otel:0",
        "http://otel:x",
        "http://:4318",
        "grpc://otel:4317",
        "http://user:secret@otel:4318",
        "http://otel:4318/?a=b",
        "http://otel:4318/#a",
        "http://otel:4318/a b",
        "http://otel:4318/\r\nx: y",
        "http://[::1:4318",
    ],
)
def test_what_is_no_url_of_a_collector_is_refused(url: str) -> None:
    assert otlp_endpoint(url) is None


def test_an_ipv6_address_is_dialed_bare_and_named_in_brackets() -> None:
    found = otlp_endpoint("https://[fd00:6d62::1]:4318")
    assert found is not None
    assert (found.tls, found.host, found.port) == (True, "fd00:6d62::1", 4318)
    assert found.authority == "[fd00:6d62::1]:4318"
