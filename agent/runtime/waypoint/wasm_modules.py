"""Fetches plugins' modules and compiles them, off the event loop.

A module that cannot be had is tried again, ever more seldom; meanwhile its
plugins act by their `failStrategy`. One that was compiled stays, for as long
as some plugin wants it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

import trio
import wasmtime

from meshbpf.agent.core.objects import ObjectSet
from meshbpf.agent.l7.filter import Call, CallAnswer, CallFailed
from meshbpf.agent.l7.wasm.fastcall import compile_module
from meshbpf.agent.l7.wasm.fetch import (
    MAX_MODULE_BYTES,
    FetchError,
    check_sha256,
    fetch_module,
    registry_authorization,
)
from meshbpf.agent.l7.wasm.runner import Plugins, Wanted
from meshbpf.agent.runtime.logs import Log

FIRST_RETRY_S = 1.0
LAST_RETRY_S = 60.0
_COMPILES = 1
"""At a time: each takes a core for up to a second."""

Caller = Callable[[Call], Awaitable[CallAnswer | CallFailed]]

log = Log("waypoint")


class ModuleLoader:
    """One task for all plugins of the process."""

    def __init__(self, plugins: Plugins, call: Caller, objects: Callable[[], ObjectSet]) -> None:
        """`objects` has the pull secrets."""
        self._plugins = plugins
        self._call = call
        self._objects = objects
        self._loading: set[Wanted] = set()
        self._compiling = trio.CapacityLimiter(_COMPILES)
        self._wake = trio.Event()

    async def run(self) -> None:
        """Load what is wanted, now and whenever the plan wants more."""
        token = trio.lowlevel.current_trio_token()

        def wake() -> None:
            # Plans are compiled in another thread.
            token.run_sync_soon(self._awake)

        self._plugins.wake = wake
        async with trio.open_nursery() as nursery:
            while True:
                self._wake = trio.Event()
                for wanted in list(self._plugins.modules.values()):
                    if wanted.module is None and wanted not in self._loading:
                        self._loading.add(wanted)
                        nursery.start_soon(self._load, wanted)
                await self._wake.wait()

    def _awake(self) -> None:
        self._wake.set()

    async def _load(self, wanted: Wanted) -> None:
        url, wait_s = wanted.source.url, FIRST_RETRY_S
        try:
            while self._plugins.modules.get(wanted.source) is wanted:
                try:
                    code = await self._fetch(wanted)
                    module = await trio.to_thread.run_sync(
                        self._compile, code, limiter=self._compiling
                    )
                except (FetchError, OSError, ValueError) as error:
                    reason = str(error)
                    if reason != wanted.failure:
                        log.warning("plugin's module cannot be loaded", url=url, reason=reason)
                    wanted.failed(reason)
                    await trio.sleep(wait_s)
                    wait_s = min(2 * wait_s, LAST_RETRY_S)
                else:
                    wanted.ready(module)
                    log.info("plugin's module loaded", url=url, bytes=len(code))
                    return
        finally:
            self._loading.discard(wanted)

    def _compile(self, code: bytes) -> wasmtime.Module:
        return compile_module(self._plugins.engine, code)

    async def _fetch(self, wanted: Wanted) -> bytes:
        source = wanted.source
        if source.url.startswith("file:"):
            code = await trio.to_thread.run_sync(_read, Path(unquote(urlsplit(source.url).path)))
            check_sha256(code, source.sha256)
            return code
        steps = fetch_module(source, registry_authorization(self._objects(), source))
        call = next(steps)
        while True:
            answer = await self._call(call)
            try:
                call = steps.send(answer)
            except StopIteration as done:
                fetched: bytes = done.value
                return fetched


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        code = file.read(MAX_MODULE_BYTES + 1)
    if len(code) > MAX_MODULE_BYTES:
        raise FetchError(f"is longer than {MAX_MODULE_BYTES} bytes")
    return code
