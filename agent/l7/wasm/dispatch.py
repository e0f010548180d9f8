"""The calls that a plugin dispatches, and its ticks: what goes on beside a request's own path."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from meshbpf.agent.core.address import AddressError
from meshbpf.agent.core.authority import Authority, parse_authority
from meshbpf.agent.l7.filter import Call, CallAnswer, CallFailed
from meshbpf.agent.l7.wasm.fastcall import GuestFaultError
from meshbpf.agent.l7.wasm.runner import Runner
from meshbpf.agent.l7.wasm.streams import Context, Dispatched
from meshbpf.agent.l7.wasm.vm import Vm

_MAX_CALLS = 64
"""Of one request or tick: a plugin may answer each call with the next one."""
_DEFAULT_CALL_TIMEOUT_S = 5.0


def run_background(runner: Runner, now_s: float) -> Generator[Call, Any, None]:
    """Start a plugin whose module has come, tick it when it is time, make its root's calls."""
    vm = runner.vm(now_s)
    if vm is None:
        return
    try:
        if vm.tick_due(now_s):
            vm.call("proxy_on_tick", vm.host.root)
        yield from make_calls(vm, vm.host.root)
    except GuestFaultError as error:
        runner.fault(str(error), now_s)


def make_calls(vm: Vm, context: Context) -> Generator[Call, Any, None]:
    """Make the calls that the plugin dispatched, and those that it dispatches meanwhile."""
    made = 0
    while context.dispatched and context.reply is None:
        made += 1
        if made > _MAX_CALLS:
            raise GuestFaultError(f"dispatched more than {_MAX_CALLS} calls for one request")
        wanted = context.dispatched.pop(0)
        target = _target(wanted)
        answer: CallAnswer | CallFailed = CallFailed("it names no host")
        if target is not None:
            answer = yield Call(
                target, wanted.head, wanted.body, wanted.timeout_s or _DEFAULT_CALL_TIMEOUT_S
            )
        sizes = (0, 0, 0)
        if isinstance(answer, CallAnswer):
            context.answer = answer
            trailers = answer.head.trailers
            sizes = (len(answer.head.headers) + 1, len(answer.body), len(trailers or ()))
        if vm.dead:
            raise GuestFaultError("it faulted while a call of it was under way")
        try:
            vm.call("proxy_on_http_call_response", context, wanted.token, *sizes)
        finally:
            context.answer = None


def _target(wanted: Dispatched) -> Authority | None:
    """Where an upstream's name leads: `outbound|80||host`, `host:port` or `host`."""
    parts = wanted.upstream.split("|")
    named = f"{parts[3]}:{parts[1]}" if len(parts) == 4 else wanted.upstream
    for text in (named, wanted.head.authority):
        for form in (text, f"{text}:80"):
            try:
                target = parse_authority(form)
            except AddressError:
                continue
            return target
    return None
