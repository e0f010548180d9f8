"""The filter that runs a plugin on requests and their answers.

What differs from Envoy, as this proxy's filters see bodies whole:
- a plugin with a body callback gets the body once, up to BODY_LIMIT_BYTES of
  it; a longer one it cannot judge is refused (or passes, under FAIL_OPEN);
- calls that a plugin dispatches are made one after another before the request
  goes on, also when it did not pause for them;
- the body callbacks of gRPC streams are not called, for a stream has no end to
  wait for.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from meshbpf.agent.l7.exchange import Exchange, Protocol
from meshbpf.agent.l7.filter import (
    CONTINUE,
    Body,
    Command,
    Filter,
    Outcome,
    ReadBody,
    Reply,
    SetBody,
    Steps,
)
from meshbpf.agent.l7.message import Headers
from meshbpf.agent.l7.wasm.abi import PAUSE
from meshbpf.agent.l7.wasm.dispatch import make_calls
from meshbpf.agent.l7.wasm.fastcall import GuestFaultError
from meshbpf.agent.l7.wasm.plugin import FailStrategy
from meshbpf.agent.l7.wasm.runner import Runner
from meshbpf.agent.l7.wasm.streams import Context
from meshbpf.agent.l7.wasm.vm import Vm

BODY_LIMIT_BYTES = 1024 * 1024
_BODILESS = frozenset({"GET", "HEAD", "OPTIONS", "DELETE", "CONNECT", "TRACE"})


class WasmFilter(Filter):
    """One plugin at one destination."""

    def __init__(self, runner: Runner) -> None:
        plugin = self.plugin = runner.plugin
        self.phase = plugin.phase
        self.name = f"{plugin.key.kind} {plugin.key.namespace}/{plugin.key.name}"
        self._runner = runner
        self._ports = plugin.ports
        self._open = plugin.fail is FailStrategy.OPEN
        self._key = f"wasm.{self.name}"

    def on_request(self, exchange: Exchange) -> Outcome | Steps:
        """Run the request's half."""
        if self._ports is not None and exchange.destination.port not in self._ports:
            return CONTINUE
        vm = self._runner.vm(exchange.started_s)
        if vm is None:
            return self._failed()
        return self._request(vm, exchange)

    def on_response(self, exchange: Exchange) -> Outcome | Steps:
        """Run the response's half, where the request's was run."""
        found: tuple[Vm, Context] | None = exchange.attributes.get(self._key)
        if found is None or exchange.response is None:
            return CONTINUE
        vm, context = found
        if vm.dead:
            return self._failed()
        return self._response(vm, context, exchange, exchange.response.headers)

    def on_end(self, exchange: Exchange) -> None:
        """Close the context."""
        found: tuple[Vm, Context] | None = exchange.attributes.pop(self._key, None)
        if found is not None:
            vm, context = found
            try:
                if not vm.dead:
                    vm.close(context)
            except GuestFaultError as error:
                self._runner.fault(str(error), exchange.ended_s)

    def explain(self, exchange: Exchange) -> str:
        """Whether it would run; what it would say only running it can tell."""
        if self._ports is not None and exchange.destination.port not in self._ports:
            return "not at this port"
        failure = self._runner.wanted.failure or self._runner.failure
        if failure:
            return f"cannot run, {'passed by' if self._open else 'refused'}: {failure}"
        return "would run"

    def _failed(self) -> Outcome:
        return CONTINUE if self._open else Reply(503, detail="wasm_fail_stream")

    def _request(self, vm: Vm, exchange: Exchange) -> Steps:
        try:
            context = vm.open(exchange)
            exchange.attributes[self._key] = (vm, context)
            outcome = yield from self._half(vm, context, exchange.request.headers)
        except GuestFaultError as error:
            exchange.attributes.pop(self._key, None)
            self._runner.fault(str(error), exchange.started_s)
            return self._failed()
        return outcome

    def _response(self, vm: Vm, context: Context, exchange: Exchange, headers: Headers) -> Steps:
        context.in_response = True
        try:
            outcome = yield from self._half(vm, context, headers)
        except GuestFaultError as error:
            exchange.attributes.pop(self._key, None)
            self._runner.fault(str(error), exchange.started_s)
            return self._failed()
        self._runner.settled()
        return outcome

    def _half(self, vm: Vm, context: Context, headers: Headers) -> Generator[Command, Any, Outcome]:
        side = "response" if context.in_response else "request"
        body_callback = f"proxy_on_{side}_body"
        with_body = _has_body(context)
        context.resumed = False
        action = vm.call(f"proxy_on_{side}_headers", context, len(headers), 0 if with_body else 1)
        yield from make_calls(vm, context)
        if (reply := context.take_reply()) is not None:
            return reply
        paused = action == PAUSE and not context.resumed
        wants_body = with_body and vm.function(body_callback) is not None
        if wants_body and _protocol(context) is not Protocol.GRPC:
            body: Body = yield ReadBody(BODY_LIMIT_BYTES)
            if not body.complete:
                # It may hide anything behind what the plugin would see.
                return CONTINUE if self._open else Reply(413, detail="wasm_body_too_large")
            context.body, context.body_changed = body.data, False
            context.resumed = False
            action = vm.call(body_callback, context, len(body.data), 1)
            yield from make_calls(vm, context)
            changed = context.changed_body()
            if (reply := context.take_reply()) is not None:
                return reply
            paused = action == PAUSE and not context.resumed
            if changed is not None and not paused:
                yield SetBody(changed)
        if paused:
            raise GuestFaultError("paused, with nothing left that it could wait for")
        return CONTINUE


def _has_body(context: Context) -> bool:
    exchange = context.exchange
    if exchange is None:
        return False
    if context.in_response:
        response = exchange.response
        if response is None or exchange.request.method == "HEAD" or response.status in (204, 304):
            return False
        return response.headers.get("content-length") != "0"
    length = exchange.request.headers.get("content-length")
    if length is not None:
        return length != "0"
    if "transfer-encoding" in exchange.request.headers:
        return True
    return exchange.protocol is not Protocol.HTTP1 and exchange.request.method not in _BODILESS


def _protocol(context: Context) -> Protocol | None:
    return None if context.exchange is None else context.exchange.protocol
