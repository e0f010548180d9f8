"""The Telemetry API (telemetry.istio.io), parsed and merged for one destination.

Widest first: the mesh (an object of the root namespace without targets), the
waypoint's namespace, the service's namespace, then what names the Gateway or
the service itself. What a narrower one says replaces what a wider one said,
field by field; overrides of metrics add up, the narrower last.

CLIENT selectors are for sidecars of clients: a waypoint is on the server's side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from meshbpf.agent.core.objects import KubeObject
from meshbpf.agent.l7.attachment import TARGET_FIELDS, applies, read_targets
from meshbpf.agent.l7.exchange import Exchange
from meshbpf.agent.l7.memo import memo_of
from meshbpf.agent.l7.problem import ObjectError, Problem
from meshbpf.agent.l7.sources import Scope
from meshbpf.agent.l7.spec import Value
from meshbpf.agent.l7.telemetry.cel import Evaluate, compile_expression
from meshbpf.agent.l7.telemetry.labels import LABELS
from meshbpf.agent.l7.telemetry.log_format import Read, compile_read
from meshbpf.agent.l7.telemetry.request_metrics import Metric

GROUP = "telemetry.istio.io"
KIND = "Telemetry"

_TCP = (
    "TCP_OPENED_CONNECTIONS",
    "TCP_CLOSED_CONNECTIONS",
    "TCP_SENT_BYTES",
    "TCP_RECEIVED_BYTES",
)
_MODES = {"CLIENT_AND_SERVER": True, "CLIENT": False, "SERVER": True}
_MAX_TAG_CHARS = 256


@dataclass(frozen=True, slots=True)
class LogRules:
    """Who is told of a request, and of which. `providers` None: nobody said."""

    providers: tuple[str, ...] | None = None
    disabled: bool = False
    wanted: Evaluate | None = None


@dataclass(frozen=True, slots=True)
class TraceRules:
    """Whether spans are made. `providers` None: nobody said."""

    providers: tuple[str, ...] | None = None
    sampling_percent: float | None = None
    report: bool = True
    propagate: bool = True
    istio_tags: bool = True
    tags: tuple[tuple[str, Read], ...] = ()


@dataclass(frozen=True, slots=True)
class MetricRules:
    """One metric. Labels in their order; those that are computed have an expression."""

    disabled: bool = False
    labels: tuple[tuple[str, Evaluate | None], ...] = tuple((name, None) for name in LABELS)

    @property
    def standard(self) -> bool:
        """Whether nothing was changed."""
        return not self.disabled and self.labels == _STANDARD.labels


_STANDARD = MetricRules()


@dataclass(frozen=True, slots=True)
class Rules:
    """All that the Telemetry objects of a destination say."""

    logs: LogRules
    traces: TraceRules
    metrics: Mapping[Metric, MetricRules]


def rules_at(scope: Scope) -> tuple[Rules, list[Problem]]:
    """Read and merge. A bad object is left out whole and reported: it guards nothing."""
    problems: list[Problem] = []
    layers: list[tuple[int, str, KubeObject, dict[str, Value]]] = []
    memo = memo_of(scope)
    for each in memo.every(GROUP, KIND):
        try:
            fields = memo.read(each, _fields)
            place = _place(scope, each, fields)
        except ObjectError as error:
            problems.append(error.problem(each))
            continue
        if place is not None:
            layers.append((place, f"{each.namespace}/{each.name}", each, fields))
    layers.sort(key=lambda layer: layer[:2])
    # Most destinations have the same layers, and expressions take long to compile.
    key = (KIND, *(layer[2].key for layer in layers))
    rules, bad = memo.make(key, lambda: _merge([layer[2:] for layer in layers]))
    return rules, [*problems, *bad]


def _fields(each: KubeObject) -> dict[str, Value]:
    return Value.spec(each).record((*TARGET_FIELDS, "tracing", "metrics", "accessLogging"))


def _merge(layers: list[tuple[KubeObject, dict[str, Value]]]) -> tuple[Rules, list[Problem]]:
    rules = Rules(LogRules(), TraceRules(), dict.fromkeys(Metric, _STANDARD))
    problems = []
    for each, fields in layers:
        try:
            rules = _merged(rules, fields)
        except ObjectError as error:
            problems.append(error.problem(each))
    return rules, problems


def _place(scope: Scope, each: KubeObject, fields: Mapping[str, Value]) -> int | None:
    """How narrow the object is; None when it is not for this destination."""
    targets = read_targets(fields)
    if targets:
        return 3 if applies(scope, each.key, targets) else None
    if "selector" in fields:
        return None
    if each.namespace == scope.root_namespace:
        return 0
    if each.namespace == scope.gateway.namespace:
        return 1
    if scope.service is not None and each.namespace == scope.service.namespace:
        return 2
    return None


def _merged(rules: Rules, fields: Mapping[str, Value]) -> Rules:
    logs, traces, metrics = rules.logs, rules.traces, dict(rules.metrics)
    for item in fields["accessLogging"].items() if "accessLogging" in fields else ():
        logs = _logs(logs, item)
    for item in fields["tracing"].items() if "tracing" in fields else ():
        traces = _traces(traces, item)
    for item in fields["metrics"].items() if "metrics" in fields else ():
        body = item.record(("providers", "overrides", "reportingInterval"))
        for override in body["overrides"].items() if "overrides" in body else ():
            _override(metrics, override)
    return Rules(logs, traces, metrics)


def _is_ours(fields: Mapping[str, Value]) -> bool:
    if "match" not in fields:
        return True
    match = fields["match"].record(("mode", "metric", "customMetric"))
    return "mode" not in match or match["mode"].choice(_MODES)


def _providers(fields: Mapping[str, Value]) -> tuple[str, ...] | None:
    if "providers" not in fields:
        return None
    found = [item.need(item.record(("name",)), "name") for item in fields["providers"].items()]
    return tuple(each.text() for each in found)


def _logs(known: LogRules, item: Value) -> LogRules:
    fields = item.record(("match", "providers", "disabled", "filter"))
    if not _is_ours(fields):
        return known
    providers = _providers(fields)
    wanted = known.wanted
    if "filter" in fields:
        body = fields["filter"].record(("expression",))
        wanted = _expression(fields["filter"].need(body, "expression"))
    return LogRules(
        known.providers if providers is None else providers,
        "disabled" in fields and fields["disabled"].boolean(),
        wanted,
    )


def _traces(known: TraceRules, item: Value) -> TraceRules:
    fields = item.record(
        (
            "match",
            "providers",
            "randomSamplingPercentage",
            "disableSpanReporting",
            "customTags",
            "useRequestIdForTraceSampling",
            "enableIstioTags",
            "disableContextPropagation",
        )
    )
    if not _is_ours(fields):
        return known
    changes: dict[str, Any] = {}
    providers = _providers(fields)
    if providers is not None:
        changes["providers"] = providers
    if "randomSamplingPercentage" in fields:
        changes["sampling_percent"] = fields["randomSamplingPercentage"].number(0, 100)
    if "disableSpanReporting" in fields:
        changes["report"] = not fields["disableSpanReporting"].boolean()
    if "disableContextPropagation" in fields:
        changes["propagate"] = not fields["disableContextPropagation"].boolean()
    if "enableIstioTags" in fields:
        changes["istio_tags"] = fields["enableIstioTags"].boolean()
    if "customTags" in fields:
        changes["tags"] = tuple(
            (name, _tag(value)) for name, value in fields["customTags"].entries()
        )
    return replace(known, **changes)


def _tag(value: Value) -> Read:
    fields = value.record(("literal", "environment", "header", "formatter"))
    if len(fields) != 1:
        raise value.error("needs one of literal, environment, header, formatter")
    ((kind, body),) = fields.items()
    parts = body.record(("value", "name", "defaultValue"))
    default = parts["defaultValue"].text(empty=True) if "defaultValue" in parts else ""
    if kind == "literal":
        text = body.need(parts, "value").text()
        return lambda _: text
    if kind == "formatter":
        form = body.need(parts, "value")
        try:
            return compile_read(form.text())
        except ValueError as error:
            raise form.error(str(error)) from None
    name = body.need(parts, "name").text()
    if kind == "environment":
        # Which variables a waypoint runs with is no part of the objects.
        raise body.error("the environment of a waypoint is not told: use a literal")

    def header(exchange: Exchange) -> str:
        return (exchange.request.headers.get(name.lower()) or default)[:_MAX_TAG_CHARS]

    return header


def _override(metrics: dict[Metric, MetricRules], item: Value) -> None:
    fields = item.record(("match", "disabled", "tagOverrides"))
    if not _is_ours(fields):
        return
    for metric in _chosen(fields.get("match")):
        rules = metrics[metric]
        if "disabled" in fields:
            rules = replace(rules, disabled=fields["disabled"].boolean())
        if "tagOverrides" in fields:
            labels = dict(rules.labels)
            for name, value in fields["tagOverrides"].entries():
                _tag_override(labels, name, value)
            rules = replace(rules, labels=tuple(labels.items()))
        metrics[metric] = rules


def _chosen(match: Value | None) -> Iterator[Metric]:
    fields = {} if match is None else match.record(("mode", "metric", "customMetric"))
    if "customMetric" in fields:
        raise fields["customMetric"].error("this proxy has no metrics but the standard ones")
    if "metric" not in fields:
        yield from Metric
        return
    written = fields["metric"].text()
    if written == "ALL_METRICS":
        yield from Metric
    elif written not in _TCP:
        yield fields["metric"].choice({each.value: each for each in Metric})


def _tag_override(labels: dict[str, Evaluate | None], name: str, value: Value) -> None:
    fields = value.record(("operation", "value"))
    operation = fields["operation"].text() if "operation" in fields else "UPSERT"
    if operation == "REMOVE":
        labels.pop(name, None)
    elif operation == "UPSERT":
        if not name.isidentifier() or not name.isascii():
            raise value.error(f"{name!r} is no label's name")
        labels[name] = _expression(value.need(fields, "value"))
    else:
        raise fields["operation"].error(f"{operation!r} is neither UPSERT nor REMOVE")


def _expression(field: Value) -> Evaluate:
    try:
        return compile_expression(field.text())
    except ValueError as error:
        raise field.error(str(error)) from None
