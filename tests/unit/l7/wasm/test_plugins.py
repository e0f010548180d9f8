"""Plugins in the path of a request: what they may do, and what becomes of those that fail."""

from __future__ import annotations

import time
from typing import Any

import pytest
import wasmtime

from meshbpf.agent.core.objects import KubeObject
from meshbpf.agent.l7.exchange import Exchange, Protocol
from meshbpf.agent.l7.filter import (
    CONTINUE,
    Body,
    Call,
    CallAnswer,
    CallFailed,
    Phase,
    ReadBody,
    Reply,
    SetBody,
)
from meshbpf.agent.l7.message import Headers, ResponseHead
from meshbpf.agent.l7.sources import Scope
from meshbpf.agent.l7.wasm.fastcall import compile_module
from meshbpf.agent.l7.wasm.filter import WasmFilter
from meshbpf.agent.l7.wasm.runner import Plugins
from meshbpf.agent.l7.wasm.source import PLUGINS, wasm_plugins
from meshbpf.agent.l7.wasm.vm import Surroundings
from tests.unit.l7.samples import a_scope, an_exchange, an_object, drive
from tests.unit.l7.wasm import filters

ECHO = [{"kind": "Service", "name": "echo"}]


class Bench:
    """Plugins of one process, with their log."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str]] = []
        around = Surroundings(lambda _, level, text: self.log.append((level, text)))
        self.plugins = Plugins(around)

    def scope(self, *objects: KubeObject) -> Scope:
        scope = a_scope(*objects)
        scope.keep[PLUGINS] = self.plugins
        return scope

    def filter(self, code: bytes, **spec: Any) -> WasmFilter:
        url = f"file:///{hash(code)}.wasm"
        plugin = an_object(
            "extensions.istio.io",
            "WasmPlugin",
            "p",
            {"url": url, "targetRefs": ECHO, **spec},
        )
        (one,), problems = wasm_plugins(self.scope(plugin))
        assert problems == []
        assert isinstance(one, WasmFilter)
        for wanted in self.plugins.modules.values():
            if wanted.module is None:
                wanted.ready(compile_module(self.plugins.engine, code))
        return one


@pytest.fixture
def bench() -> Bench:
    return Bench()


def with_body(body: str = "hi", **more: Any) -> Exchange:
    return an_exchange("POST", headers={"content-length": str(len(body)), **more})


def respond(exchange: Exchange, status: int = 200) -> Exchange:
    exchange.response = ResponseHead(status, Headers([(b"content-length", b"0")]))
    return exchange


def test_a_plugin_edits_request_and_response(bench: Bench) -> None:
    one = bench.filter(filters.ADD_HEADER)
    exchange = an_exchange(path="/a", headers={"x-secret": "1", "x-other": "2"})
    assert drive(one.on_request(exchange)) == (CONTINUE, [])
    assert dict(exchange.request.headers.items()) == {"x-other": "2", "x-plugin": "seen"}
    assert exchange.request.path == "/rewritten"
    assert drive(one.on_response(respond(exchange))) == (CONTINUE, [])
    assert exchange.response is not None
    assert exchange.response.headers.get("x-plugin") == "seen"


def test_a_plugin_answers_itself(bench: Bench) -> None:
    one = bench.filter(filters.DENY)
    outcome, _ = drive(one.on_request(an_exchange()))
    assert outcome == Reply(403, b"go away", (("x-why", "not"),), "no_token")
    assert drive(one.on_request(an_exchange(headers={"x-token": "t"})))[0] is CONTINUE


def test_a_plugin_reads_and_replaces_a_body(bench: Bench) -> None:
    one = bench.filter(filters.BODY)
    exchange = with_body("hi")
    outcome, commands = drive(one.on_request(exchange), Body(b"hi", True), None)
    assert outcome is CONTINUE
    assert commands == [ReadBody(1024 * 1024), SetBody(b"HELLO")]
    assert exchange.request.headers.get("x-body") == "hi"


def test_a_body_that_is_too_long_to_be_judged_does_not_pass(bench: Bench) -> None:
    outcome, _ = drive(bench.filter(filters.BODY).on_request(with_body()), Body(b"h", False))
    assert outcome == Reply(413, detail="wasm_body_too_large")
    lax = bench.filter(filters.BODY, failStrategy="FAIL_OPEN")
    assert drive(lax.on_request(with_body()), Body(b"h", False))[0] is CONTINUE


def test_a_grpc_stream_is_not_held_for_its_end(bench: Bench) -> None:
    one = bench.filter(filters.ADD_HEADER)
    exchange = with_body()
    exchange.protocol = Protocol.GRPC
    assert drive(one.on_request(exchange)) == (CONTINUE, [])


def test_a_plugin_asks_a_service(bench: Bench) -> None:
    one = bench.filter(filters.HTTP_CALL)
    exchange = an_exchange()
    outcome, commands = drive(one.on_request(exchange), CallAnswer(ResponseHead(200), b"pong"))
    assert outcome is CONTINUE
    (call,) = commands
    assert isinstance(call, Call)
    assert str(call.target) == "authz.shop.svc.cluster.local:8000"
    assert (call.head.method, call.head.path, call.head.authority) == ("POST", "/p", "authz")
    assert (call.body, call.timeout_s) == (b"ping", 1.5)
    assert exchange.request.headers.get("x-answer") == "pong"


def test_a_plugin_learns_that_a_service_did_not_answer(bench: Bench) -> None:
    one = bench.filter(filters.HTTP_CALL)
    outcome, _ = drive(one.on_request(an_exchange()), CallFailed("refused"))
    assert outcome == Reply(500, detail="wasm_local_response")


FAULT = Reply(503, detail="wasm_fail_stream")


def ask(one: WasmFilter, seconds: float = 0.0, **headers: str) -> Any:
    exchange = an_exchange(headers={k.replace("_", "-"): v for k, v in headers.items()})
    exchange.started_s = seconds
    outcome, _ = drive(one.on_request(exchange))
    return outcome


def test_after_a_trap_fail_close_refuses_for_good(bench: Bench) -> None:
    one = bench.filter(filters.TRAP)
    assert ask(one) is CONTINUE
    assert ask(one, x_trap="1") == FAULT
    assert ask(one, 3600.0) == FAULT
    assert bench.log[-1][0] == "error"
    assert "unreachable" in bench.log[-1][1]
    assert one.explain(an_exchange()).startswith("cannot run, refused: ")


def test_after_a_trap_fail_open_lets_all_pass(bench: Bench) -> None:
    one = bench.filter(filters.TRAP, failStrategy="FAIL_OPEN")
    assert ask(one, x_trap="1") is CONTINUE
    assert ask(one, x_trap="1") is CONTINUE
    assert len(bench.log) == 1  # it is not even tried


def test_after_a_trap_fail_reload_starts_a_new_machine_after_a_while(bench: Bench) -> None:
    one = bench.filter(filters.TRAP, failStrategy="FAIL_RELOAD")
    assert ask(one, 0.0, x_trap="1") == FAULT
    assert ask(one, 0.9) == FAULT
    assert ask(one, 1.0) is CONTINUE
    assert ask(one, 1.0, x_trap="1") == FAULT
    assert ask(one, 2.9) == FAULT  # the second time it takes longer
    assert ask(one, 3.0) is CONTINUE


def test_a_request_whose_plugin_faulted_under_another_ends_as_the_strategy_says(
    bench: Bench,
) -> None:
    one = bench.filter(filters.TRAP)
    first = an_exchange()
    assert drive(one.on_request(first))[0] is CONTINUE
    assert ask(one, x_trap="1") == FAULT
    assert drive(one.on_response(respond(first)))[0] == FAULT
    one.on_end(first)


def test_an_endless_loop_is_stopped(bench: Bench) -> None:
    one = bench.filter(filters.SPIN)
    before = time.process_time()
    assert ask(one) == FAULT
    assert time.process_time() - before < 1.0
    assert "fuel" in bench.log[-1][1]


def test_memory_has_a_limit(bench: Bench) -> None:
    assert ask(bench.filter(filters.HUNGRY)) == FAULT


def test_a_pause_that_nothing_can_end_is_a_fault(bench: Bench) -> None:
    assert ask(bench.filter(filters.PAUSE_FOR_EVER)) == FAULT
    assert "paused" in bench.log[-1][1]


def test_a_plugin_that_refuses_its_configuration_does_not_run(bench: Bench) -> None:
    assert ask(bench.filter(filters.REFUSE_CONFIGURATION)) == FAULT


def test_a_plugin_gets_its_configuration_as_json(bench: Bench) -> None:
    one = bench.filter(filters.CONFIGURED, pluginConfig={"a": [1, "ü"]})
    exchange = an_exchange()
    assert drive(one.on_request(exchange))[0] is CONTINUE
    found = exchange.request.headers.get("x-config")
    assert found is not None
    assert found.encode("latin-1").decode() == '{"a":[1,"ü"]}'
    assert bench.log == [("info", '{"a":[1,"ü"]}')]


def test_a_plugin_reads_who_the_caller_is(bench: Bench) -> None:
    exchange = an_exchange()
    assert drive(bench.filter(filters.PROPERTY).on_request(exchange))[0] is CONTINUE
    assert exchange.request.headers.get("x-property") == "spiffe://cluster.local/ns/shop/sa/web"


def test_plugins_share_data_and_count(bench: Bench) -> None:
    one = bench.filter(filters.SHARED)
    first, second = an_exchange(), an_exchange()
    for exchange in (first, second):
        assert drive(one.on_request(exchange))[0] is CONTINUE
        one.on_end(exchange)
    assert "x-shared" not in first.request.headers
    assert second.request.headers.get("x-shared") == "kept"
    (metric,) = bench.plugins.around.metrics.found
    assert (metric.name, metric.value) == ("seen_total", 2 * 42)


def test_what_is_not_there_bad_memory_and_bad_fields_are_the_plugins_to_handle(
    bench: Bench,
) -> None:
    exchange = an_exchange()
    assert drive(bench.filter(filters.UNKNOWN).on_request(exchange))[0] is CONTINUE
    assert len(exchange.request.headers) == 0


def test_until_its_module_is_there_a_plugin_acts_as_its_strategy_says(bench: Bench) -> None:
    for strategy, outcome in (("FAIL_CLOSE", FAULT), ("FAIL_OPEN", CONTINUE)):
        spec = {"url": "oci://x/y:z", "targetRefs": ECHO, "failStrategy": strategy}
        plugin = an_object("extensions.istio.io", "WasmPlugin", strategy.lower(), spec)
        (one,), _ = wasm_plugins(bench.scope(plugin))
        assert drive(one.on_request(an_exchange()))[0] == outcome


def test_a_module_that_is_no_plugin_is_told() -> None:
    bench = Bench()
    one = bench.filter(bytes(wasmtime.wat2wasm('(module (memory (export "memory") 1))')))
    assert ask(one) == FAULT
    assert "not a proxy-wasm plugin" in one.explain(an_exchange())


def test_ports_choose_where_a_plugin_runs(bench: Bench) -> None:
    for match, runs in (
        ([{"mode": "SERVER"}], True),
        ([{"mode": "CLIENT"}], False),
        ([{"ports": [{"number": 80}]}], True),
        ([{"mode": "SERVER", "ports": [{"number": 443}]}], False),
    ):
        exchange = an_exchange()
        assert drive(bench.filter(filters.PROPERTY, match=match).on_request(exchange))
        assert ("x-property" in exchange.request.headers) is runs


def test_order_is_by_phase_then_priority(bench: Bench) -> None:
    def named(name: str, kind: str = "WasmPlugin", **spec: Any) -> KubeObject:
        body = {"targetRefs": ECHO, **spec}
        return an_object("extensions.istio.io", kind, name, body)

    url = {"url": "file:///x"}
    found, problems = wasm_plugins(
        bench.scope(
            named("low", priority=-1, **url),
            named("early", phase="AUTHN", **url),
            named("high", priority=7, **url),
            named("both", "TrafficExtension", priority=3, wasm=url),
        )
    )
    assert problems == []
    names = [each.name.rpartition("/")[2] for each in sorted(found, key=lambda f: f.phase)]
    assert names == ["early", "high", "both", "low"]
    assert found[0].phase is Phase.WASM


BAD = [
    ({}, "spec.url"),
    ({"url": "ftp://x/y"}, "spec.url"),
    ({"url": "file:relative"}, "spec.url"),
    ({"url": "file:///x", "sha256": "abc"}, "spec.sha256"),
    ({"url": "file:///x", "phase": "LATE"}, "spec.phase"),
    ({"url": "file:///x", "failStrategy": "OPEN"}, "spec.failStrategy"),
    ({"url": "file:///x", "type": "NETWORK"}, "spec.type"),
    ({"url": "file:///x", "verificationKey": "k"}, "spec.verificationKey"),
    ({"url": "file:///x", "pluginConfig": "text"}, "spec.pluginConfig"),
    ({"url": "file:///x", "match": [{"ports": [{"number": 0}]}]}, "spec.match[0].ports[0].number"),
]


@pytest.mark.parametrize(("spec", "field"), BAD)
def test_a_bad_field_is_named(bench: Bench, spec: dict[str, Any], field: str) -> None:
    plugin = an_object("extensions.istio.io", "WasmPlugin", "p", {"targetRefs": ECHO, **spec})
    found, problems = wasm_plugins(bench.scope(plugin))
    assert found == []
    assert [problem.field for problem in problems] == [field]


def test_lua_is_told_to_be_missing(bench: Bench) -> None:
    spec = {"targetRefs": ECHO, "lua": {"inlineCode": "x"}}
    plugin = an_object("extensions.istio.io", "TrafficExtension", "p", spec)
    found, problems = wasm_plugins(bench.scope(plugin))
    assert (found, problems[0].field) == ([], "spec.lua")


def test_unchanged_plugins_keep_their_machine(bench: Bench) -> None:
    one, again = bench.filter(filters.SHARED), bench.filter(filters.SHARED)
    assert one._runner is again._runner
    changed = bench.filter(filters.SHARED, priority=1)
    assert changed._runner is not one._runner
    bench.plugins.retain({changed._runner.plugin})
    assert bench.plugins.runner(one._runner.plugin) is not one._runner


def test_a_request_through_a_plugin_takes_a_tenth_of_a_millisecond_at_most(bench: Bench) -> None:
    one = bench.filter(filters.ADD_HEADER)
    best = float("inf")
    for _ in range(5):
        exchanges = [an_exchange() for _ in range(100)]
        before = time.process_time()
        for exchange in exchanges:
            drive(one.on_request(exchange))
            drive(one.on_response(respond(exchange)))
            one.on_end(exchange)
        best = min(best, (time.process_time() - before) / len(exchanges))
    assert best < 100e-6
