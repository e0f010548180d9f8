"""What filters need of the process: sinks of telemetry, code of plugins, and their tasks.

Made before the first plan, since that already holds filters; run beside the
proxy. What filters keep over changes of the objects is in `keep`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import trio

from meshbpf.agent.core.objects import ObjectSet
from meshbpf.agent.l7.plan import WaypointPlan
from meshbpf.agent.l7.telemetry.filter import Sinks
from meshbpf.agent.l7.telemetry.source import SINKS
from meshbpf.agent.l7.wasm.source import PLUGINS, plugins_in
from meshbpf.agent.runtime.exposition import Family, Kind, single
from meshbpf.agent.runtime.waypoint.access_lines import AccessLines
from meshbpf.agent.runtime.waypoint.calls import Calls
from meshbpf.agent.runtime.waypoint.request_families import (
    plugin_families,
    policy_families,
    request_families,
    tcp_families,
)
from meshbpf.agent.runtime.waypoint.span_export import SpanExporter

try:
    from meshbpf.agent.l7.wasm.filter import WasmFilter
    from meshbpf.agent.runtime.waypoint.wasm_modules import ModuleLoader
    from meshbpf.agent.runtime.waypoint.wasm_ticks import tick_plugins
except ImportError:
    # Without the extra `wasm` its source reports each plugin as unsupported.
    _WASM = False
else:
    _WASM = True


class Extensions:
    """All of it, for one process."""

    def __init__(self, namespace: str, name: str) -> None:
        self.keep: dict[tuple[str, ...], Any] = {}
        self.lines = AccessLines()
        self.spans = SpanExporter(f"{name}.{namespace}")
        self.sinks = Sinks(write_line=self.lines.write, export_span=self.spans.export)
        self.keep[SINKS] = self.sinks

    async def run(self, calls: Calls, objects: Callable[[], ObjectSet]) -> None:
        """Export spans and load modules, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.spans.run, calls)
            if _WASM:
                plugins = plugins_in(self.keep)
                nursery.start_soon(ModuleLoader(plugins, calls, objects).run)
                nursery.start_soon(tick_plugins, plugins, calls)

    def retain(self, plan: WaypointPlan) -> None:
        """Forget the plugins that no filter of the plan runs."""
        if not _WASM or PLUGINS not in self.keep:
            return
        chains = [plan.pods, *(service.chain for service in plan.services.values())]
        used = {
            one.plugin for chain in chains for one in chain.filters if isinstance(one, WasmFilter)
        }
        plugins_in(self.keep).retain(used)

    def families(self) -> Iterator[Family]:
        """For the metrics page."""
        yield from request_families(self.sinks.metrics)
        yield from tcp_families(self.sinks.tcp)
        yield from policy_families(self.sinks.policies)
        exported = self.spans.statistics
        lines = self.lines.statistics().values()
        counters = {
            "spans_exported": ("Spans that collectors took", exported.exported),
            "spans_dropped": ("Spans that no collector took", exported.dropped),
            "access_lines": ("Access log lines written", sum(each.written for each in lines)),
            "access_lines_dropped": (
                "Access log lines lost because nobody read",
                sum(each.dropped for each in lines),
            ),
        }
        for name, (told, count) in counters.items():
            yield single(f"meshbpf_waypoint_{name}", told, Kind.COUNTER, count)
        if _WASM and PLUGINS in self.keep:
            yield from plugin_families(plugins_in(self.keep).around.metrics)

    def close(self) -> None:
        """Write what is queued."""
        self.lines.close()
