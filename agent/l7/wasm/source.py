"""From the objects to the plugins of a destination.

A plugin whose object goes bad runs on as it was. One that never was good is
left out, as Istio's admission would not have taken it; one whose code cannot
be had or run acts by its `failStrategy`.
"""

from __future__ import annotations

import logging
from typing import Any

from meshbpf.agent.l7.attachment import applies
from meshbpf.agent.l7.filter import Filter
from meshbpf.agent.l7.memo import memo_of
from meshbpf.agent.l7.problem import ObjectError, Problem
from meshbpf.agent.l7.sources import Scope
from meshbpf.agent.l7.wasm.plugin import GROUP, KINDS, Plugin

try:
    from meshbpf.agent.l7.wasm.filter import WasmFilter
    from meshbpf.agent.l7.wasm.runner import Plugins
    from meshbpf.agent.l7.wasm.vm import Surroundings
except ImportError as missing:
    _MISSING = f"cannot be run: {missing}; install meshbpf[wasm]"
else:
    _MISSING = ""

PLUGINS = ("wasm", "plugins")
"""In `Scope.keep`: the Plugins, for whoever fetches modules and tells metrics."""

_LOGGER = logging.getLogger("meshbpf.wasm")
_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


def wasm_plugins(scope: Scope) -> tuple[list[Filter], list[Problem]]:
    """The filters of all WasmPlugins and TrafficExtensions at a destination."""
    found: list[Plugin] = []
    problems: list[Problem] = []
    memo = memo_of(scope)
    for kind in KINDS:
        for each in memo.every(GROUP, kind):
            try:
                if _MISSING:
                    raise ObjectError("spec", _MISSING, reason="Unsupported")
                plugin = memo.read(each, plugins_in(scope.keep).parse)
            except ObjectError as error:
                problems.append(error.problem(each))
                good = None if _MISSING else memo.last_good(each, plugins_in(scope.keep).parse)
                if good is None:
                    continue
                plugin = good
            if applies(scope, plugin.key, plugin.targets):
                found.append(plugin)
    # The highest first; the phase is sorted by later, and stably.
    found.sort(key=lambda plugin: (-plugin.priority, plugin.key.namespace, plugin.key.name))
    return [WasmFilter(plugins_in(scope.keep).runner(plugin)) for plugin in found], problems


def plugins_in(keep: dict[tuple[str, ...], Any]) -> Plugins:
    """The process's plugins, made at the first use."""
    found = keep.get(PLUGINS)
    if found is None:
        found = keep[PLUGINS] = Plugins(Surroundings(_log))
    made: Plugins = found
    return made


def _log(plugin: str, level: str, text: str) -> None:
    _LOGGER.log(_LEVELS[level], "%s", text, extra={"fields": {"plugin": plugin}})
