"""The waypoint's shells for filters: modules are loaded, spans exported, lines written."""

from __future__ import annotations

import hashlib
import socket
from itertools import pairwise
from pathlib import Path

import pytest
import trio
import trio.testing

from meshbpf.agent.core.address import SocketAddress
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.objects import ObjectKey, ObjectSet
from meshbpf.agent.l7.filter import CONTINUE, Call, CallAnswer, CallFailed, Phase
from meshbpf.agent.l7.message import Headers, ResponseHead
from meshbpf.agent.l7.providers import OtlpTracing
from meshbpf.agent.l7.telemetry.request_metrics import RequestMetrics
from meshbpf.agent.l7.telemetry.trace import Span, SpanContext
from meshbpf.agent.l7.wasm.abi import MetricType
from meshbpf.agent.l7.wasm.fastcall import compile_module
from meshbpf.agent.l7.wasm.filter import WasmFilter
from meshbpf.agent.l7.wasm.plugin import FailStrategy, ModuleSource, Plugin
from meshbpf.agent.l7.wasm.runner import Plugins, Wanted
from meshbpf.agent.l7.wasm.shared import PluginMetrics
from meshbpf.agent.l7.wasm.vm import Surroundings
from meshbpf.agent.runtime.exposition import render
from meshbpf.agent.runtime.waypoint.access_lines import AccessLines
from meshbpf.agent.runtime.waypoint.calls import _guarded_address
from meshbpf.agent.runtime.waypoint.channel import BrokenError, SocketChannel
from meshbpf.agent.runtime.waypoint.request_families import plugin_families, request_families
from meshbpf.agent.runtime.waypoint.span_export import BATCH_SPANS, QUEUE_SPANS, SpanExporter
from meshbpf.agent.runtime.waypoint.wasm_modules import ModuleLoader
from meshbpf.agent.runtime.waypoint.wasm_ticks import tick_plugins
from meshbpf.agent.wire.grpc import Decoder
from meshbpf.agent.wire.pb import otlp_pb2 as pb
from tests.unit.l7.samples import an_exchange, drive
from tests.unit.l7.test_telemetry import done
from tests.unit.l7.wasm import filters


def a_plugin(url: str, sha256: str = "") -> Plugin:
    key = ObjectKey("extensions.istio.io", "WasmPlugin", "shop", "p")
    source = ModuleSource(url, sha256)
    return Plugin(key, source, (), Phase.WASM, 0, "", FailStrategy.CLOSE, b"", (), None)


async def nobody(call: Call) -> CallFailed:
    return CallFailed("nobody is there")


def some_plugins() -> Plugins:
    return Plugins(Surroundings(lambda *_: None))


async def loaded(wanted: Wanted) -> None:
    with trio.fail_after(20):
        while wanted.module is None:  # noqa: ASYNC110 (it has no event, as nobody else waits)
            await trio.sleep(0.01)


async def test_a_module_is_read_from_a_file_when_a_plan_wants_it(tmp_path: Path) -> None:
    plugins = some_plugins()
    (tmp_path / "a b.wasm").write_bytes(filters.ADD_HEADER)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ModuleLoader(plugins, nobody, lambda: ObjectSet.EMPTY).run)
        await trio.testing.wait_all_tasks_blocked()
        # A plan is compiled in a thread of its own.
        url = (tmp_path / "a b.wasm").as_uri()
        runner = await trio.to_thread.run_sync(plugins.runner, a_plugin(url))
        await loaded(runner.wanted)
        assert runner.vm(0.0) is not None
        nursery.cancel_scope.cancel()


async def test_a_file_with_other_bytes_than_named_is_not_run(tmp_path: Path) -> None:
    plugins = some_plugins()
    file = tmp_path / "p.wasm"
    file.write_bytes(b"something else")
    wanted = hashlib.sha256(filters.ADD_HEADER).hexdigest()
    runner = plugins.runner(a_plugin(file.as_uri(), wanted))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ModuleLoader(plugins, nobody, lambda: ObjectSet.EMPTY).run)
        with trio.fail_after(20):
            while "sha256" not in runner.wanted.failure:  # noqa: ASYNC110 (likewise)
                await trio.sleep(0.01)
        # It is looked at again, and found mended.
        file.write_bytes(filters.ADD_HEADER)
        await loaded(runner.wanted)
        nursery.cancel_scope.cancel()


async def test_a_module_is_fetched_by_the_proxys_own_calls() -> None:
    plugins = some_plugins()
    asked: list[str] = []

    async def web(call: Call) -> CallAnswer:
        asked.append(f"{call.target}{call.head.path}")
        return CallAnswer(ResponseHead(200), filters.ADD_HEADER)

    runner = plugins.runner(a_plugin("http://files.example/p.wasm"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ModuleLoader(plugins, web, lambda: ObjectSet.EMPTY).run)
        await loaded(runner.wanted)
        nursery.cancel_scope.cancel()
    assert asked == ["files.example:80/p.wasm"]


async def test_a_plugin_ticks_without_requests_and_makes_calls(
    autojump_clock: trio.testing.MockClock,
) -> None:
    plugins = some_plugins()
    runner = plugins.runner(a_plugin("file:///tick.wasm"))
    runner.wanted.ready(compile_module(plugins.engine, filters.TICK))
    asked: list[float] = []

    async def web(call: Call) -> CallAnswer:
        asked.append(trio.current_time())
        await trio.lowlevel.checkpoint()
        return CallAnswer(ResponseHead(200), f"answer {len(asked)}".encode())

    begun = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tick_plugins, plugins, web)
        await trio.sleep(1.75)
        nursery.cancel_scope.cancel()
    assert len(asked) == 4
    assert asked[0] == begun
    assert all(0.49 < later - at < 0.62 for at, later in pairwise(asked))
    exchange = an_exchange()
    assert drive(WasmFilter(runner).on_request(exchange))[0] is CONTINUE
    assert exchange.request.headers.get("x-kept") == "answer 4"


# --- spans

COLLECTOR = OtlpTracing("otel", SocketAddress.parse("198.51.100.9:4317"))
OVER_HTTP = OtlpTracing("otel", COLLECTOR.target, http_path="/v1/traces")


def a_span(number: int) -> Span:
    context = SpanContext(f"{number + 1:032x}", f"{number + 1:016x}", True)
    return Span(context, f"s{number}", 1000, 500, False, (("a", "b"),), "otel")


class Collector:
    def __init__(self, answer: CallAnswer | CallFailed) -> None:
        self.answer = answer
        self.calls: list[Call] = []

    async def __call__(self, call: Call) -> CallAnswer | CallFailed:
        await trio.lowlevel.checkpoint()
        self.calls.append(call)
        return self.answer


def grpc_ok() -> CallAnswer:
    head = ResponseHead(200, Headers([(b"content-type", b"application/grpc")]))
    head.trailers = Headers([(b"grpc-status", b"0")])
    return CallAnswer(head, b"\0\0\0\0\0")


async def test_spans_go_out_in_batches(autojump_clock: trio.testing.MockClock) -> None:
    exporter, collector = SpanExporter("waypoint.shop"), Collector(grpc_ok())
    for number in range(BATCH_SPANS + 1):
        exporter.export(COLLECTOR, a_span(number))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(exporter.run, collector)
        await trio.sleep(1.5)
        nursery.cancel_scope.cancel()
    assert len(collector.calls) == 2
    assert exporter.statistics.exported == BATCH_SPANS + 1
    (message,) = Decoder("Export", 1 << 20).feed(collector.calls[1].body)
    (resource,) = pb.ExportTraceServiceRequest.FromString(message).resource_spans
    assert resource.resource.attributes[0].value.string_value == "waypoint.shop"
    (span,) = resource.scope_spans[0].spans
    assert span.name == f"s{BATCH_SPANS}"
    assert span.end_time_unix_nano - span.start_time_unix_nano == 500


async def test_over_http_the_message_is_the_body(autojump_clock: trio.testing.MockClock) -> None:
    exporter, collector = SpanExporter("w"), Collector(CallAnswer(ResponseHead(200), b""))
    exporter.export(OVER_HTTP, a_span(1))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(exporter.run, collector)
        await trio.sleep(1.5)
        nursery.cancel_scope.cancel()
    (call,) = collector.calls
    assert call.head.path == "/v1/traces"
    assert len(pb.ExportTraceServiceRequest.FromString(call.body).resource_spans) == 1


async def test_what_a_collector_does_not_take_is_dropped_and_counted(
    autojump_clock: trio.testing.MockClock,
) -> None:
    exporter, collector = SpanExporter("w"), Collector(CallFailed("refused"))
    for number in range(QUEUE_SPANS + 10):
        exporter.export(COLLECTOR, a_span(number))
    assert exporter.statistics.dropped == 10
    async with trio.open_nursery() as nursery:
        nursery.start_soon(exporter.run, collector)
        await trio.sleep(1.5)
        nursery.cancel_scope.cancel()
    assert exporter.statistics.dropped == 10 + BATCH_SPANS
    assert exporter.statistics.exported == 0


# --- lines, families


def test_lines_go_to_a_file_and_one_that_cannot_be_opened_costs_nothing(tmp_path: Path) -> None:
    lines = AccessLines()
    path = str(tmp_path / "access.log")
    lines.write(path, "one\n")
    lines.write(path, "two\n")
    lines.write(str(tmp_path / "no" / "folder"), "lost\n")
    lines.close()
    assert Path(path).read_text() == "one\ntwo\n"


def test_the_page_has_counters_histograms_and_plugins_metrics() -> None:
    metrics = RequestMetrics()
    metrics.standard(done()).record(done())
    page = "".join(render(each, openmetrics=False) for each in request_families(metrics))
    assert "# TYPE istio_requests_total counter" in page
    assert "# TYPE istio_request_duration_milliseconds histogram" in page
    assert 'istio_requests_total{reporter="waypoint",source_workload="web",' in page
    assert 'connection_security_policy="mutual_tls",le="50.0"} 1' in page
    assert 'connection_security_policy="mutual_tls",le="25.0"} 0' in page
    plugins = PluginMetrics()
    plugins.define(MetricType.COUNTER, "seen-by.me_total")
    page = "".join(render(each, openmetrics=False) for each in plugin_families(plugins))
    assert "wasmcustom_seen_by_me_total 0" in page


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "169.254.169.254", "::1"])
async def test_a_guarded_name_that_means_this_host_is_refused(host: str) -> None:
    with pytest.raises(MeshbpfError, match=r"own|metadata"):
        await _guarded_address(host, 80)


async def test_a_guarded_address_elsewhere_is_dialed() -> None:
    assert await _guarded_address("198.51.100.9", 80) == "198.51.100.9"


async def test_a_reader_of_a_socket_that_is_closed_ends_and_the_next_socket_is_its_own() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    channel = SocketChannel(ours)
    number = ours.fileno()

    async def read() -> None:
        with pytest.raises(BrokenError):
            await channel.receive()

    with theirs:
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                await trio.testing.wait_all_tasks_blocked()
                channel.close()
        # The kernel gives the lowest number that is free.
        again, other = socket.socketpair()
        with again, other:
            assert number in (again.fileno(), other.fileno())
            for each in (again, other):
                each.setblocking(False)
                with trio.move_on_after(0):
                    await trio.lowlevel.wait_readable(each)
