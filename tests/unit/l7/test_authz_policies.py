"""How policies of one destination work together, where they apply, and what a bad one does."""

from __future__ import annotations

from typing import Any

import pytest

from meshbpf.agent.core.objects import KubeObject
from meshbpf.agent.core.service import Service
from meshbpf.agent.l7.authz.filter import AUDITED, REHEARSED, AuthorizationFilter
from meshbpf.agent.l7.authz.parse import parse_policy
from meshbpf.agent.l7.authz.source import authorization
from meshbpf.agent.l7.filter import CONTINUE
from meshbpf.agent.l7.problem import ObjectError
from tests.unit.l7.samples import a_scope, an_exchange, an_object

ECHO = {"kind": "Service", "group": "", "name": "echo"}
ADMIN = {"to": [{"operation": {"paths": ["/admin*"]}}]}


def policy(name: str = "p", *, targets: Any = (ECHO,), **spec: Any) -> KubeObject:
    more = {key: spec.pop(key) for key in ("namespace", "annotations") if key in spec}
    body = {"targetRefs": list(targets), **spec}
    return an_object("security.istio.io", "AuthorizationPolicy", name, body, **more)


def passes(*objects: KubeObject, path: str = "/", **scope: Any) -> bool:
    filters, problems = authorization(a_scope(*objects, **scope))
    assert problems == []
    return all(each.on_request(an_exchange(path=path)) is CONTINUE for each in filters)


def test_without_policies_there_is_no_filter() -> None:
    assert authorization(a_scope()) == ([], [])


def test_deny_wins_over_allow() -> None:
    allow = policy("a", rules=[{}])
    deny = policy("z", action="DENY", rules=[ADMIN])
    assert passes(allow, deny)
    assert not passes(allow, deny, path="/admin")


def test_an_allow_without_rules_denies_everything() -> None:
    assert not passes(policy())
    assert passes(policy(rules=[{}]))


def test_either_of_two_allows_will_do() -> None:
    assert passes(policy("a"), policy("b", rules=[ADMIN]), path="/admin")


def test_audit_marks_and_lets_pass() -> None:
    filters, _ = authorization(a_scope(policy(action="AUDIT", rules=[ADMIN])))
    exchange = an_exchange(path="/admin")
    assert filters[0].on_request(exchange) is CONTINUE
    assert exchange.attributes[AUDITED] == ("shop/p",)
    other = an_exchange()
    assert filters[0].on_request(other) is CONTINUE
    assert AUDITED not in other.attributes


def test_dry_run_only_tells() -> None:
    dry = {"istio.io/dry-run": "true"}
    filters, _ = authorization(
        a_scope(policy(action="DENY", rules=[ADMIN], annotations=dry), policy("q", annotations=dry))
    )
    exchange = an_exchange(path="/admin")
    assert filters[0].on_request(exchange) is CONTINUE
    assert exchange.attributes[REHEARSED] == ("shop/p would deny",)
    assert "shop/p would deny" in filters[0].explain(exchange)


def test_policies_of_the_gateway_and_its_class_hold_for_each_service_and_pod() -> None:
    gateway = {"kind": "Gateway", "group": "gateway.networking.k8s.io", "name": "waypoint"}
    assert not passes(policy(targets=[gateway]))
    assert not passes(policy(targets=[gateway]), service=None)
    for name in ("meshbpf-waypoint", "istio-waypoint"):
        of_class = {**gateway, "kind": "GatewayClass", "name": name}
        assert not passes(policy(targets=[of_class], namespace="istio-system"))
        assert passes(policy(targets=[of_class]))  # only the root namespace may


@pytest.mark.parametrize(
    ("targets", "namespace"),
    [
        ([{**ECHO, "name": "other"}], "shop"),
        ([ECHO], "bank"),
        ([], "shop"),
        ([{"kind": "Gateway", "group": "gateway.networking.k8s.io", "name": "other"}], "shop"),
    ],
)
def test_policies_for_others_do_not_hold_here(targets: Any, namespace: str) -> None:
    assert passes(policy(targets=targets, namespace=namespace))


def test_a_policy_is_for_a_service_or_a_service_entry_of_its_name_and_not_for_both() -> None:
    entry = {**ECHO, "kind": "ServiceEntry", "group": "networking.istio.io"}
    outside = Service(name="echo", namespace="shop", hostname="echo.example.com")
    assert not passes(policy(targets=[entry]), service=outside)
    assert passes(policy(targets=[entry]))
    assert passes(policy(targets=[ECHO]), service=outside)


def test_a_policy_with_a_selector_is_the_node_proxies_own() -> None:
    spec = {"selector": {"matchLabels": {"app": "echo"}}}
    assert passes(an_object("security.istio.io", "AuthorizationPolicy", "p", spec))


def test_policies_of_a_service_do_not_hold_for_a_pods_own_address() -> None:
    assert passes(policy(), service=None)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"action": "PERMIT"}, "spec.action"),
    ({"action": "DENY"}, "spec.rules"),
    ({"action": "CUSTOM", "rules": [{}]}, "spec.provider"),
    ({"provider": {"name": "x"}}, "spec.provider"),
    ({"rule": []}, "spec.rule"),
    ({"rules": [{"from": []}]}, "spec.rules[0].from"),
    ({"rules": [{"from": [{}]}]}, "spec.rules[0].from[0].source"),
    ({"rules": [{"from": [{"source": {}}]}]}, "spec.rules[0].from[0].source"),
    (
        {"rules": [{"from": [{"source": {"principal": ["x"]}}]}]},
        "spec.rules[0].from[0].source.principal",
    ),
    (
        {"rules": [{"from": [{"source": {"ipBlocks": ["198.18.0.0/99"]}}]}]},
        "spec.rules[0].from[0].source.ipBlocks[0]",
    ),
    (
        {"rules": [{"from": [{"source": {"serviceAccounts": ["a/b/c"]}}]}]},
        "spec.rules[0].from[0].source.serviceAccounts[0]",
    ),
    (
        {"rules": [{"from": [{"source": {"serviceAccounts": ["a"], "namespaces": ["b"]}}]}]},
        "spec.rules[0].from[0].source",
    ),
    (
        {"rules": [{"from": [{"source": {"trustDomains": ["a/b"]}}]}]},
        "spec.rules[0].from[0].source.trustDomains[0]",
    ),
    (
        {"rules": [{"to": [{"operation": {"ports": ["70000"]}}]}]},
        "spec.rules[0].to[0].operation.ports[0]",
    ),
    (
        {"rules": [{"to": [{"operation": {"ports": [80]}}]}]},
        "spec.rules[0].to[0].operation.ports[0]",
    ),
    (
        {"rules": [{"to": [{"operation": {"paths": ["/{**}/x"]}}]}]},
        "spec.rules[0].to[0].operation.paths[0]",
    ),
    (
        {"rules": [{"to": [{"operation": {"paths": ["/{*}/x*"]}}]}]},
        "spec.rules[0].to[0].operation.paths[0]",
    ),
    (
        {"rules": [{"to": [{"operation": {"paths": ["/{id}"]}}]}]},
        "spec.rules[0].to[0].operation.paths[0]",
    ),
    (
        {"rules": [{"to": [{"operation": {"methods": [""]}}]}]},
        "spec.rules[0].to[0].operation.methods[0]",
    ),
    ({"rules": [{"when": [{"key": "source.ip"}]}]}, "spec.rules[0].when[0]"),
    (
        {"rules": [{"when": [{"key": "source.port", "values": ["1"]}]}]},
        "spec.rules[0].when[0].key",
    ),
    (
        {"rules": [{"when": [{"key": "request.headers[]", "values": ["1"]}]}]},
        "spec.rules[0].when[0].key",
    ),
    (
        {"rules": [{"when": [{"key": "experimental.envoy.filters.a[b]", "values": ["1"]}]}]},
        "spec.rules[0].when[0].key",
    ),
]


@pytest.mark.parametrize(("spec", "field"), BAD)
def test_a_bad_field_is_named(spec: dict[str, Any], field: str) -> None:
    with pytest.raises(ObjectError) as caught:
        parse_policy(policy(**spec))
    assert caught.value.field == field


def test_a_bad_annotation_is_named() -> None:
    with pytest.raises(ObjectError, match=r"istio.io/dry-run\]: is neither true nor false"):
        parse_policy(policy(annotations={"istio.io/dry-run": "maybe"}))


@pytest.mark.parametrize("action", ["ALLOW", "DENY"])
def test_a_bad_policy_closes_its_target_and_is_reported(action: str) -> None:
    bad = policy(action=action, rules=[{"to": [{"operation": {"pathz": ["/"]}}]}])
    filters, problems = authorization(a_scope(bad))
    assert filters[0].on_request(an_exchange()) is not CONTINUE
    (problem,) = problems
    assert str(problem) == (
        "p.yaml:1: AuthorizationPolicy shop/p: spec.rules[0].to[0].operation.pathz: "
        "unknown field; meant paths?"
    )


def test_a_bad_target_holds_nowhere_and_is_reported() -> None:
    filters, problems = authorization(a_scope(policy(targets=[{"kind": "Pod", "name": "x"}])))
    assert filters == []
    assert problems[0].field == "spec.targetRefs[0].kind"


def test_which_rule_denies_does_not_depend_on_the_order_of_the_objects() -> None:
    one, two = policy("a", action="DENY", rules=[{}]), policy("b", action="DENY", rules=[{}])
    for objects in ((one, two), (two, one)):
        filters, _ = authorization(a_scope(*objects))
        assert isinstance(filters[0], AuthorizationFilter)
        assert "DENY shop/a" in filters[0].explain(an_exchange())
