"""The mesh's own configuration: what Istio keeps in the ConfigMap `istio` of the root namespace.

Only what a waypoint reads of it: the providers that policies name, how paths
are normalized, and what is logged when no Telemetry says otherwise. It is
written for istiod, so unknown fields are another component's and pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from meshbpf.agent.core.objects import KubeObject
from meshbpf.agent.l7.filter import Filter
from meshbpf.agent.l7.memo import memo_of
from meshbpf.agent.l7.paths import DEFAULT, NormalizePath, PathNormalization
from meshbpf.agent.l7.problem import ObjectError, Problem
from meshbpf.agent.l7.providers import Provider, read_provider
from meshbpf.agent.l7.sources import Scope
from meshbpf.agent.l7.spec import Value

NAME = "istio"


@dataclass(frozen=True, slots=True)
class DefaultProviders:
    """Who is told of requests when a Telemetry names nobody."""

    access_logging: tuple[str, ...] = ()
    tracing: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MeshConfig:
    """The parts that a waypoint reads."""

    providers: Mapping[str, Provider] = field(default_factory=dict)
    normalization: PathNormalization = DEFAULT
    access_log_file: str = ""
    access_log_format: str = ""
    access_log_json: bool = False
    defaults: DefaultProviders = DefaultProviders()
    trust_domain_aliases: tuple[str, ...] = ()


def read_mesh_config(scope: Scope) -> tuple[MeshConfig, list[Problem]]:
    """The configuration, its defaults where a part is bad or absent, and what is bad."""
    source = scope.objects.get("", "ConfigMap", scope.root_namespace, NAME)
    if source is None:
        return MeshConfig(), []
    config, problems = memo_of(scope).read(source, _read)
    return config, list(problems)


def _read(source: KubeObject) -> tuple[MeshConfig, list[Problem]]:
    problems: list[Problem] = []
    text = (source.body.get("data") or {}).get("mesh", "")
    try:
        raw = yaml.safe_load(text) or {}
        if not isinstance(raw, dict):
            raise yaml.YAMLError("not a mapping")
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        problems.append(ObjectError("data.mesh", f"is not YAML: {said}").problem(source))
        return MeshConfig(), problems

    providers: dict[str, Provider] = {}
    problems += _provider_problems(source, raw, providers)
    normalization = DEFAULT
    try:
        normalization = _normalization(source, raw)
    except ObjectError as error:
        problems.append(error.problem(source))
    defaults = raw.get("defaultProviders") or {}
    return (
        MeshConfig(
            providers,
            normalization,
            str(raw.get("accessLogFile") or ""),
            str(raw.get("accessLogFormat") or ""),
            raw.get("accessLogEncoding") == "JSON",
            DefaultProviders(*(_names(defaults, name) for name in _DEFAULTS)),
            _names(raw, "trustDomainAliases"),
        ),
        problems,
    )


_DEFAULTS = ("accessLogging", "tracing", "metrics")


def _provider_problems(
    source: KubeObject, raw: Mapping[str, Any], providers: dict[str, Provider]
) -> list[Problem]:
    """Fill `providers`; a bad one does not take the others with it."""
    problems = []
    written = raw.get("extensionProviders")
    for index, entry in enumerate(written if isinstance(written, list) else ()):
        value = Value(source, entry, f"data.mesh: extensionProviders[{index}]")
        try:
            provider = read_provider(value)
        except ObjectError as error:
            problems.append(error.problem(source))
        else:
            providers[provider.name] = provider
    return problems


def _normalization(source: KubeObject, raw: Mapping[str, Any]) -> PathNormalization:
    written = (raw.get("pathNormalization") or {}).get("normalization", "DEFAULT")
    table = {each.value: each for each in PathNormalization} | {"DEFAULT": DEFAULT}
    return Value(source, written, "data.mesh: pathNormalization.normalization").choice(table)


def _names(defaults: Any, name: str) -> tuple[str, ...]:
    found = defaults.get(name) if isinstance(defaults, dict) else None
    return tuple(str(each) for each in found) if isinstance(found, list) else ()


def path_normalization(scope: Scope) -> tuple[list[Filter], list[Problem]]:
    """The filter that brings paths to one spelling, as far as the mesh wants it."""
    mesh, problems = read_mesh_config(scope)
    return [NormalizePath(mesh.normalization)], problems
