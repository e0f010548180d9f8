"""From the objects to the telemetry filter of a destination.

Metrics are always counted. What is logged and traced is as Telemetry objects
say, else as the mesh configuration does, else nothing. What names a provider
that is not there, or that this proxy cannot use, is reported and left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from meshbpf.agent.core.objects import ObjectKey
from meshbpf.agent.l7.filter import Filter
from meshbpf.agent.l7.mesh_config import MeshConfig, read_mesh_config
from meshbpf.agent.l7.problem import Problem
from meshbpf.agent.l7.providers import FileLog, OtlpTracing, Provider
from meshbpf.agent.l7.sources import Scope
from meshbpf.agent.l7.telemetry.filter import BeginSpan, LogTarget, Sinks, TelemetryFilter, Tracing
from meshbpf.agent.l7.telemetry.log_format import Line, compile_json, compile_text
from meshbpf.agent.l7.telemetry.rules import LogRules, rules_at

P = TypeVar("P", FileLog, OtlpTracing)

SINKS = ("telemetry", "sinks")
"""In `Scope.keep`: the Sinks."""

# Istio defines it in every mesh (manifests/charts, meshConfig defaults).
_BUILT_IN: dict[str, Provider] = {"envoy": FileLog("envoy")}
_SAMPLING_PERCENT = 1.0  # meshConfig.defaultConfig.tracing.sampling


def telemetry(scope: Scope) -> tuple[list[Filter], list[Problem]]:
    """The filter that tells, and the one that begins spans where there are any."""
    mesh, problems = read_mesh_config(scope)
    rules, bad = rules_at(scope)
    problems += bad
    sinks: Sinks = scope.keep.setdefault(SINKS, Sinks())
    logs = list(_logs(scope, mesh, rules.logs, problems))
    tracing = None
    names = rules.traces.providers
    for provider in _providers(
        scope, mesh, mesh.defaults.tracing if names is None else names, OtlpTracing, problems
    ):
        sampling = rules.traces.sampling_percent
        tracing = Tracing(
            provider, rules.traces, _SAMPLING_PERCENT if sampling is None else sampling
        )
        break  # Envoy, too, traces to one
    filters: list[Filter] = [TelemetryFilter(sinks, logs, tracing, rules.metrics)]
    if tracing is not None:
        filters.append(BeginSpan(sinks, tracing))
    return filters, problems


def _logs(
    scope: Scope, mesh: MeshConfig, rules: LogRules, problems: list[Problem]
) -> Iterator[LogTarget]:
    if rules.disabled:
        return
    names = rules.providers
    if names is None and not mesh.defaults.access_logging:
        if mesh.access_log_file:
            line = compile_json() if mesh.access_log_json else _text(scope, mesh, problems)
            yield LogTarget(mesh.access_log_file, line, rules.wanted)
        elif rules.wanted is not None:
            # Who filters wants a log: Istio's own default is the built-in one.
            yield LogTarget("/dev/stdout", compile_text(), rules.wanted)
        return
    wanted = mesh.defaults.access_logging if names is None else names
    for provider in _providers(scope, mesh, wanted, FileLog, problems):
        try:
            if provider.labels is not None:
                line = compile_json(provider.labels)
            else:
                line = compile_text(provider.text)
        except ValueError as error:
            problems.append(_mesh_problem(scope, f"{provider.name}: {error}"))
            continue
        yield LogTarget(provider.path, line, rules.wanted)


def _text(scope: Scope, mesh: MeshConfig, problems: list[Problem]) -> Line:
    try:
        return compile_text(mesh.access_log_format)
    except ValueError as error:
        problems.append(_mesh_problem(scope, f"accessLogFormat: {error}"))
        return compile_text()


def _providers(
    scope: Scope,
    mesh: MeshConfig,
    names: Iterable[str],
    kind: type[P],
    problems: list[Problem],
) -> Iterator[P]:
    for name in names:
        found = mesh.providers.get(name) or _BUILT_IN.get(name)
        if isinstance(found, kind):
            yield found
        else:
            problems.append(
                _mesh_problem(scope, f"no usable provider {name!r} for {kind.__name__}")
            )


def _mesh_problem(scope: Scope, what: str) -> Problem:
    key = ObjectKey("", "ConfigMap", scope.root_namespace, "istio")
    source = scope.objects.by_key.get(key)
    origin = source.origin if source is not None else "mesh configuration"
    return Problem(key, origin, "data.mesh: extensionProviders", what, reason="ProviderNotFound")
