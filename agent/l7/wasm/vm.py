"""A running plugin: one machine, its root context and those of its requests.

The order of calls is proxy-wasm's: start, root context, `on_vm_start`,
`on_configure`; then for each request a context of its own, callbacks, `on_done`,
`on_log`, `on_delete`. Each call from outside gets CALL_FUEL; whatever faults
ends the machine, and who uses it decides what that means (filter.py).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import wasmtime

from meshbpf.agent.l7.exchange import Exchange
from meshbpf.agent.l7.wasm.abi import ABI_EXPORTS, Status
from meshbpf.agent.l7.wasm.fastcall import GuestFaultError, GuestFunction, Machine
from meshbpf.agent.l7.wasm.host import Host
from meshbpf.agent.l7.wasm.shared import PluginMetrics, SharedData
from meshbpf.agent.l7.wasm.streams import Context
from meshbpf.agent.l7.wasm.wasi import ENOSYS, Wasi

CALL_FUEL = 50_000_000
"""About as many instructions: 30 ms of a tight loop where this was measured."""
CONFIGURE_FUEL = 1_000_000_000
MEMORY_LIMIT_BYTES = 64 * 1024 * 1024
_LAST_CONTEXT = 0x7FFF_FFFF


@dataclass(frozen=True, slots=True)
class Settings:
    """What a plugin is started with."""

    name: str
    root_id: str = ""
    configuration: bytes = b""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Surroundings:
    """What the plugins of a process share, and where time and randomness come from."""

    log: Callable[[str, str, str], None]
    """(plugin, level, text)."""
    shared: SharedData = field(default_factory=SharedData)
    metrics: PluginMetrics = field(default_factory=PluginMetrics)
    now_ns: Callable[[], int] = time.time_ns
    random_bytes: Callable[[int], bytes] = os.urandom


class Vm:
    """One plugin, started. Raises GuestFaultError or ValueError when it cannot be."""

    def __init__(
        self,
        engine: wasmtime.Engine,
        module: wasmtime.Module,
        settings: Settings,
        around: Surroundings,
    ) -> None:
        def log(level: str, text: str) -> None:
            around.log(settings.name, level, text)

        self.host = Host(
            name=settings.name,
            root_id=settings.root_id,
            configuration=settings.configuration,
            vm_configuration=b"",
            shared=around.shared,
            metrics=around.metrics,
            now_ns=around.now_ns,
            log=log,
        )
        wasi = Wasi(
            environment=settings.environment,
            now_ns=around.now_ns,
            random_bytes=around.random_bytes,
            log=log,
        )
        functions = {**self.host.functions(), **wasi.functions()}
        self._machine = Machine(
            engine, module, functions, _unknown, memory_limit_bytes=MEMORY_LIMIT_BYTES
        )
        self._functions: dict[str, GuestFunction | None] = {}
        if not any(self.function(name) for name in ABI_EXPORTS):
            raise ValueError(f"exports none of {', '.join(ABI_EXPORTS)}: not a proxy-wasm plugin")
        allocate = self.function("proxy_on_memory_allocate") or self.function("malloc")
        if allocate is None:
            raise ValueError("exports neither proxy_on_memory_allocate nor malloc")
        self._allocate = allocate
        self.host.guest = wasi.guest = self
        self.dead = False
        """It faulted: nothing may run in it any more, for whichever request."""
        self._next = 2  # 1 is the root's
        self._ticked_s = float("-inf")
        self._start(settings)

    def function(self, name: str) -> GuestFunction | None:
        """An export, looked up once."""
        try:
            return self._functions[name]
        except KeyError:
            found = self._functions[name] = self._machine.export(name)
            return found

    def call(self, name: str, context: Context, *values: int, fuel: int = CALL_FUEL) -> int:
        """Run a callback in a context; 0 (go on) where the plugin has none."""
        function = self.function(name)
        if function is None:
            return 0
        self.host.effective = context
        self._machine.refuel(fuel)
        try:
            # Older versions of the ABI have callbacks with fewer arguments.
            return function(context.id, *values)
        except GuestFaultError:
            self.dead = True
            raise

    def open(self, exchange: Exchange) -> Context:
        """A context for a request."""
        number = self._next
        self._next = number + 1 if number < _LAST_CONTEXT else 2
        context = self.host.contexts[number] = Context(number, exchange)
        self.call("proxy_on_context_create", context, self.host.root.id)
        return context

    def close(self, context: Context) -> None:
        """The request is over."""
        if self.host.contexts.pop(context.id, None) is not None:
            self.call("proxy_on_done", context)
            self.call("proxy_on_log", context)
            self.call("proxy_on_delete", context)

    def tick_due(self, now_s: float) -> bool:
        """Whether the period that the plugin asked for has passed since this last said so."""
        period_s = self.host.tick_period_s
        if not period_s or now_s - self._ticked_s < period_s:
            return False
        self._ticked_s = now_s
        return True

    # --- what host functions need (host.Guest)

    def read(self, address: int, size: int) -> bytes:
        """Guest memory."""
        return self._machine.read(address, size)

    def write(self, address: int, data: bytes) -> None:
        """Change guest memory."""
        self._machine.write(address, data)

    def allocate(self, data: bytes) -> int:
        """A copy of `data` in memory that the guest frees."""
        address = self._allocate(len(data))
        if address == 0:
            raise MemoryError("the plugin has no memory left")
        self._machine.write(address, data)
        return address

    def _start(self, settings: Settings) -> None:
        self._machine.refuel(CONFIGURE_FUEL)
        start = self.function("_initialize") or self.function("_start")
        if start is not None:
            start()
        root = self.host.root
        self.call("proxy_on_context_create", root, 0, fuel=CONFIGURE_FUEL)
        for callback, size in (
            ("proxy_on_vm_start", 0),
            ("proxy_on_configure", len(settings.configuration)),
        ):
            wanted = self.function(callback) is not None
            if wanted and not self.call(callback, root, size, fuel=CONFIGURE_FUEL):
                raise GuestFaultError(f"{callback} refused its configuration")


def _unknown(module: str, name: str) -> int:
    return ENOSYS if module.startswith("wasi") else Status.UNIMPLEMENTED
