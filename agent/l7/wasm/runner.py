"""A plugin's life: its module, the machine that runs, and what follows when that faults.

The module comes from outside (a file, a registry) and takes time to fetch and
to compile, so a Runner begins without it. Whoever fetches modules takes the
Wanted from `Plugins.wanted` and calls `ready` or `failed`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import wasmtime

from meshbpf.agent.core.objects import KubeObject
from meshbpf.agent.l7.wasm.fastcall import GuestFaultError, make_engine
from meshbpf.agent.l7.wasm.plugin import FailStrategy, ModuleSource, Plugin, parse_plugin
from meshbpf.agent.l7.wasm.vm import Settings, Surroundings, Vm

RELOAD_FIRST_S = 1.0  # Envoy's ReloadConfig backoff
RELOAD_MOST_S = 60.0


@dataclass(slots=True, eq=False)
class Wanted:
    """One module, used by all plugins with the same source."""

    source: ModuleSource
    module: wasmtime.Module | None = None
    failure: str = "is not loaded yet"

    def ready(self, module: wasmtime.Module) -> None:
        """It has come."""
        self.module, self.failure = module, ""

    def failed(self, reason: str) -> None:
        """It will not come, for now."""
        self.failure = reason


class Runner:
    """One plugin with one configuration. Used from one thread."""

    def __init__(self, plugin: Plugin, wanted: Wanted, plugins: Plugins) -> None:
        self.plugin = plugin
        self.wanted = wanted
        self.failure = ""
        """Why it does not run; empty while it does, or has not been asked to."""
        self._plugins = plugins
        self._vm: Vm | None = None
        self._failures = 0
        self._retry_s = float("-inf")

    def vm(self, now_s: float) -> Vm | None:
        """The machine, started when needed; None when it cannot run now."""
        if self._vm is not None:
            return self._vm
        module = self.wanted.module
        if module is None or now_s < self._retry_s:
            return None
        if self.failure and self.plugin.fail is not FailStrategy.RELOAD:
            return None
        key = self.plugin.key
        settings = Settings(
            self.plugin.name or f"{key.namespace}/{key.name}",
            self.plugin.name,
            self.plugin.configuration,
            dict(self.plugin.environment),
        )
        try:
            self._vm = Vm(self._plugins.engine, module, settings, self._plugins.around)
        except (GuestFaultError, ValueError, MemoryError) as error:
            self.fault(str(error), now_s)
            return None
        self.failure = ""
        return self._vm

    def fault(self, reason: str, now_s: float) -> None:
        """The machine faulted and is gone; a new one only under FAIL_RELOAD, after a while."""
        self._vm = None
        self.failure = reason
        wait_s = min(RELOAD_FIRST_S * 2**self._failures, RELOAD_MOST_S)
        self._failures = min(self._failures + 1, 16)
        self._retry_s = now_s + wait_s
        self._plugins.around.log(
            f"{self.plugin.key.namespace}/{self.plugin.key.name}", "error", f"fault: {reason}"
        )

    def settled(self) -> None:
        """A request went well: the next fault is a first one."""
        self._failures = 0


@dataclass(slots=True)
class Plugins:
    """All plugins of a process; outlives changes of the objects."""

    around: Surroundings
    engine: wasmtime.Engine = field(default_factory=make_engine)
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    modules: dict[ModuleSource, Wanted] = field(default_factory=dict)
    wake: Callable[[], None] = lambda: None
    """Called when a module is wanted that was not before."""
    _runners: dict[Plugin, Runner] = field(default_factory=dict)

    def parse(self, source: KubeObject) -> Plugin:
        """Read an object, with this process's environment."""
        return parse_plugin(source, self.environ)

    def runner(self, plugin: Plugin) -> Runner:
        """The runner of a plugin as it is configured now."""
        found = self._runners.get(plugin)
        if found is None:
            wanted = self.modules.get(plugin.source)
            if wanted is None:
                wanted = self.modules[plugin.source] = Wanted(plugin.source)
                self.wake()
            found = self._runners[plugin] = Runner(plugin, wanted, self)
        return found

    def runners(self) -> tuple[Runner, ...]:
        """All that some plan uses."""
        return tuple(self._runners.values())

    def retain(self, plugins: set[Plugin]) -> None:
        """Forget all others, and modules that nobody wants any more."""
        self._runners = {p: runner for p, runner in self._runners.items() if p in plugins}
        sources = {plugin.source for plugin in plugins}
        self.modules = {s: wanted for s, wanted in self.modules.items() if s in sources}
