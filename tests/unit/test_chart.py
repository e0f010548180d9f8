"""The Helm chart says what the code does: rights, metrics, options."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import meshbpf
from meshbpf.agent.config_keys import KEYS
from meshbpf.agent.core.kube_mesh import KINDS
from meshbpf.agent.core.objects import KubeObject, ObjectKey
from meshbpf.agent.l7.kinds import KINDS as L7_KINDS
from meshbpf.agent.l7.oversight import POLICY_KINDS
from meshbpf.agent.l7.planner import ROUTE_KINDS
from meshbpf.agent.l7.problem import ObjectError
from meshbpf.agent.l7.rate_limit import read_rate_limit
from meshbpf.agent.runtime.kubernetes import plural
from tests.progs import chart
from tests.progs.chart import CHART

ROOT = Path(__file__).parents[2]
# Metrics that are made with a prefix and a loop, and Istio's, which traffic_metrics.py makes.
SOURCES = ("agent_metrics.py", "traffic_metrics.py")
METRIC = re.compile(r"\b(?:meshbpf|istio)_[a-z_]+\b")


def rules() -> list[dict[str, Any]]:
    text = (CHART / "templates" / "clusterrole.yaml").read_text()
    part = text[text.index("rules:") : text.index("\n---")]
    found: list[dict[str, Any]] = yaml.safe_load(part)["rules"]
    return found


def test_the_role_grants_what_is_watched_and_the_annotation_and_nothing_else() -> None:
    wanted = {
        (group, plural(kind), verb)
        for group, _version, kind in KINDS
        for verb in ("get", "list", "watch")
    }
    assert triples(rules()) == wanted | {("", "pods/status", "patch")}


def granted(name: str) -> set[tuple[str, str, str]]:
    """(group, resource, verb) of a file of rules."""
    return triples(chart.rules(name))


def triples(rules: list[dict[str, Any]]) -> set[tuple[str, str, str]]:
    return {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_a_waypoint_may_read_what_it_follows_and_nothing_else() -> None:
    kinds = [(group, kind) for group, _version, kind in (*KINDS, *L7_KINDS)]
    assert granted("waypoint") == {
        (group, plural(kind), verb)
        for group, kind in (*kinds, ("", "ConfigMap"))
        for verb in ("get", "list", "watch")
    }


def test_the_controller_may_write_what_it_applies_and_the_statuses_that_it_judges() -> None:
    statuses = {("gateway.networking.k8s.io", kind) for kind in ("Gateway", "GatewayClass")}
    statuses |= {("gateway.networking.k8s.io", kind) for kind in ROUTE_KINDS}
    written = {
        (group, resource, verb)
        for group, resource, verb in granted("controller")
        if verb not in ("get", "list", "watch")
    }
    assert written == {
        *((group, f"{plural(kind)}/status", "patch") for group, kind in (*statuses, *POLICY_KINDS)),
        *(
            (group, resource, verb)
            for group, resource in (
                ("", "serviceaccounts"),
                ("", "services"),
                ("apps", "deployments"),
                ("gateway.networking.k8s.io", "gatewayclasses"),
            )
            for verb in ("create", "patch")
        ),
        ("rbac.authorization.k8s.io", "clusterrolebindings", "patch"),
        ("rbac.authorization.k8s.io", "clusterroles", "bind"),
    }


def test_every_metric_in_alerts_and_dashboard_is_one_that_the_agent_has() -> None:
    code = "".join((ROOT / "agent" / "runtime" / name).read_text() for name in SOURCES)
    used = set(METRIC.findall((CHART / "alerts.yaml").read_text()))
    dashboard = json.loads((CHART / "dashboards" / "meshbpf.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            used |= set(METRIC.findall(target["expr"]))
    assert len(used) > 12
    for name in used:
        bare = name.removesuffix("_total")
        known = bare in code or any(
            bare.startswith(prefix) and bare.removeprefix(prefix) in code
            for prefix in ("meshbpf_pool_", "istio_tcp_")
        )
        assert known, f"nothing makes {name}"


def test_the_daemonset_gives_run_options_that_it_has() -> None:
    text = (CHART / "templates" / "daemonset.yaml").read_text()
    agent = text[text.index("- run\n") : text.index("env:")]
    options = set(re.findall(r"- (--[a-z-]+)", agent))
    assert options <= {key.option for key in KEYS}
    assert {"--kubernetes", "--node", "--state-dir", "--ca-dir"} <= options


def test_the_definition_of_a_rate_limit_has_the_fields_that_are_read() -> None:
    definition = yaml.safe_load((CHART / "crds" / "ratelimits.yaml").read_text())["spec"]
    (version,) = definition["versions"]
    read = next(each for each in L7_KINDS if each[0] == definition["group"])
    assert read == (definition["group"], version["name"], definition["names"]["kind"])
    assert plural(read[2]) == definition["names"]["plural"]
    spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    good = {
        name: field["enum"] if "enum" in field else [field.get("minimum"), field.get("maximum")]
        for name, field in spec["properties"].items()
        if name != "targetRefs"
    }
    for name, values in good.items():
        for value in values:
            read_rate_limit(rate_limit({"requests": 5, name: value}), {})
        bad = 0 if isinstance(values[0], int) else "Fortnight"
        with pytest.raises(ObjectError, match=name):
            read_rate_limit(rate_limit({"requests": 5, name: bad}), {})
    with pytest.raises(ObjectError):
        read_rate_limit(rate_limit({"unknown": 1, "requests": 5}), {})
    for missing in spec["required"]:
        with pytest.raises(ObjectError, match=missing):
            read_rate_limit(
                rate_limit({name: good[name][0] for name in good if name != missing}), {}
            )


def rate_limit(spec: dict[str, Any]) -> KubeObject:
    key = ObjectKey("meshbpf.io", "RateLimit", "shop", "few")
    return KubeObject(key, "v1alpha1", {"spec": spec})


def test_the_chart_is_of_this_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == meshbpf.__version__


def test_every_value_is_in_the_schema_and_has_a_default() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())

    def compare(given: dict[str, Any], known: dict[str, Any], path: str) -> None:
        named = known["properties"]
        assert set(given) == set(named) - {"global"}, path
        for key, value in given.items():
            if isinstance(value, dict) and "properties" in named[key]:
                compare(value, named[key], f"{path}.{key}")

    compare(values, schema, "values")
