"""Ticks of plugins, and the calls that their root contexts dispatch.

A plugin that asks for a tick more often than every RESOLUTION_S gets it that
often. One plugin's calls hold up its own next tick, and no other's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from meshbpf.agent.l7.filter import Call, CallAnswer, CallFailed
from meshbpf.agent.l7.wasm.dispatch import run_background
from meshbpf.agent.l7.wasm.runner import Plugins, Runner

RESOLUTION_S = 0.1

Caller = Callable[[Call], Awaitable[CallAnswer | CallFailed]]


async def tick_plugins(plugins: Plugins, call: Caller) -> None:
    """Until cancelled."""
    busy: set[Runner] = set()

    async def run(runner: Runner) -> None:
        busy.add(runner)
        steps = run_background(runner, trio.current_time())
        try:
            wanted = next(steps, None)
            while wanted is not None:
                answer = await call(wanted)
                try:
                    wanted = steps.send(answer)
                except StopIteration:
                    wanted = None
        finally:
            busy.discard(runner)

    async with trio.open_nursery() as nursery:
        while True:
            for runner in plugins.runners():
                if runner not in busy:
                    nursery.start_soon(run, runner)
            await trio.sleep(RESOLUTION_S)
