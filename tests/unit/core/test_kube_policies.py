"""AuthorizationPolicy and PeerAuthentication as node proxies get them."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from meshbpf.agent.core.authz import ConnectionFacts, authorize
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.kube_mesh import Translation
from meshbpf.agent.core.policy import (
    Authorization,
    Match,
    MatchKind,
    PolicyAction,
    PolicyScope,
    ServiceAccountMatch,
    StringMatch,
)
from meshbpf.agent.core.store import Snapshot
from tests.unit.core.kube import POD, told, translated, workload

pytestmark = pytest.mark.compat


def policy_yaml(spec: str, name: str = "p", namespace: str = "shop", extra: str = "") -> str:
    return f"""\
    apiVersion: security.istio.io/v1
    kind: AuthorizationPolicy
    metadata: {{name: {name}, namespace: {namespace}{extra}}}
    spec: {{{spec}}}
    """


def peer_yaml(
    spec: str, name: str = "default", namespace: str = "shop", created: str = "2026-01-01T00:00:00Z"
) -> str:
    return f"""\
    apiVersion: security.istio.io/v1
    kind: PeerAuthentication
    metadata: {{name: {name}, namespace: {namespace}, creationTimestamp: "{created}"}}
    spec: {{{spec}}}
    """


def one(found: Translation) -> Authorization:
    (policy,) = found.state.policies
    return policy


def allows(found: Translation, account: str | None, port: int = 80) -> bool:
    """Whether the state lets `account` of namespace shop into the pod web-0."""
    mesh = Snapshot.of(found.state)
    identity = None if account is None else SpiffeId("cluster.local", "shop", account)
    facts = ConnectionFacts(identity, ip_address("198.18.1.9"), ip_address("198.18.1.1"), port)
    return authorize(mesh.policies_for(workload(found)), facts).allowed


def test_scope_is_selector_namespace_or_mesh() -> None:
    assert one(translated(policy_yaml(""))).scope is PolicyScope.NAMESPACE
    root = translated(policy_yaml("", namespace="istio-system"))
    assert one(root).scope is PolicyScope.GLOBAL
    selecting = policy_yaml("selector: {matchLabels: {app: web}}")
    found = translated(POD, selecting)
    assert one(found).scope is PolicyScope.WORKLOAD_SELECTOR
    assert workload(found).authorization_policies == ("shop/p",)
    others = POD.replace("app: web", "app: other")
    assert workload(translated(others, selecting)).authorization_policies == ()


def test_a_selecting_policy_of_the_root_namespace_reaches_every_namespace() -> None:
    root = policy_yaml("selector: {matchLabels: {app: web}}", namespace="istio-system")
    assert workload(translated(POD, root)).authorization_policies == ("istio-system/p",)
    foreign = policy_yaml("selector: {matchLabels: {app: web}}", namespace="bank")
    assert workload(translated(POD, foreign)).authorization_policies == ()


def test_rules_become_clauses_of_matches() -> None:
    found = translated(
        policy_yaml(
            """
            action: DENY,
            rules: [
              {from: [
                {source: {principals: ["cluster.local/ns/a/sa/b", "*", "*/sa/x", "cluster.local/*"],
                          notNamespaces: [c], serviceAccounts: [d, e/f]}},
                {source: {ipBlocks: [198.51.100.7, 198.51.100.0/25]}}],
               to: [{operation: {ports: ["80", "443"], notPorts: ["22"]}}],
               when: [{key: destination.ip, values: [198.18.0.0/15], notValues: [198.18.1.1]},
                      {key: source.serviceAccount, values: [g]}]},
              {}]
            """
        )
    )
    first, second = one(found).rules
    assert second == ()
    to, source, when, account = first
    assert to == (Match(destination_ports=(80, 443), not_destination_ports=(22,)),)
    assert source[0] == Match(
        principals=(
            StringMatch(MatchKind.EXACT, "cluster.local/ns/a/sa/b"),
            StringMatch(MatchKind.PRESENCE),
            StringMatch(MatchKind.SUFFIX, "/sa/x"),
            StringMatch(MatchKind.PREFIX, "cluster.local/"),
        ),
        not_namespaces=(StringMatch(MatchKind.EXACT, "c"),),
        service_accounts=(ServiceAccountMatch("shop", "d"), ServiceAccountMatch("e", "f")),
    )
    assert source[1].source_ips == (
        ip_network("198.51.100.7/32"),
        ip_network("198.51.100.0/25"),
    )
    assert when[0].destination_ips == (ip_network("198.18.0.0/15"),)
    assert when[0].not_destination_ips == (ip_network("198.18.1.1/32"),)
    assert account[0].service_accounts == (ServiceAccountMatch("shop", "g"),)
    assert found.problems == ()


def test_an_allow_rule_with_http_in_it_allows_nothing_and_is_told() -> None:
    found = translated(
        POD,
        policy_yaml(
            "rules: [{to: [{operation: {methods: [GET]}}]},"
            " {from: [{source: {serviceAccounts: [ok]}}]}]"
        ),
    )
    assert allows(found, "ok")
    assert not allows(found, "other")
    assert "HTTP's methods" in told(found)[0]
    alone = translated(
        POD, policy_yaml("rules: [{when: [{key: 'request.headers[x]', values: [y]}]}]")
    )
    assert not allows(alone, "ok")


@pytest.mark.parametrize(
    "rule",
    [
        "{to: [{operation: {paths: [/admin]}}]}",
        "{from: [{source: {serviceAccounts: [bad]}}], to: [{operation: {paths: [/admin]}}]}",
        "{from: [{source: {serviceAccounts: [bad]}}], "
        "when: [{key: 'request.auth.claims[x]', values: [y]}]}",
        "{from: [{source: {serviceAccounts: [bad]}}], "
        "to: [{operation: {paths: [/], ports: ['80']}}]}",
    ],
)
def test_a_deny_rule_with_http_in_it_denies_by_what_is_left(rule: str) -> None:
    found = translated(POD, policy_yaml(f"action: DENY, rules: [{rule}]"))
    assert not allows(found, "bad")
    assert allows(found, "good") is ("serviceAccounts" in rule)
    assert "deny by what is left of them" in told(found)[0]


def test_a_policy_for_a_waypoint_is_not_the_node_proxys() -> None:
    target = "targetRefs: [{kind: Service, group: '', name: web}]"
    assert translated(policy_yaml(target)).state.policies == ()
    found = translated(policy_yaml("action: CUSTOM, provider: {name: x}"))
    assert found.state.policies == ()
    assert "cannot take the action CUSTOM" in told(found)[0]


def test_dry_run_is_an_annotation() -> None:
    extra = ", annotations: {istio.io/dry-run: 'true'}"
    assert one(translated(policy_yaml("", extra=extra))).dry_run


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ("rules: [{from: [{source: {ipBlocks: [nonsense]}}]}]", "source.ipBlocks[0]"),
        ("rules: [{to: [{operation: {ports: [http]}}]}]", "operation.ports[0]"),
        ("rules: [{form: []}]", "spec.rules[0].form"),
        ("rules: [{from: [{source: {serviceAccounts: [a/b/c]}}]}]", "serviceAccounts[0]"),
        ("ruls: []", "spec.ruls"),
    ],
)
@pytest.mark.parametrize("action", ["ALLOW", "DENY"])
def test_a_policy_that_cannot_be_read_fails_closed(action: str, spec: str, field: str) -> None:
    found = translated(POD, policy_yaml(f"action: {action}, {spec}"))
    assert one(found).action is PolicyAction(action)
    assert one(found).inexpressible
    assert not allows(found, "anyone")
    assert field in told(found)[0]


def test_an_action_that_nobody_knows_denies() -> None:
    found = translated(POD, policy_yaml("action: DENYY, rules: [{}]"))
    assert not allows(found, "anyone")
    assert "DENYY" in told(found)[0]


STRICT = "mtls: {mode: STRICT}"
ROOT = "istio-system"
STATIC = f"{ROOT}/istio_converted_static_strict"


@pytest.mark.parametrize(
    ("policies", "strict"),
    [
        ([], False),
        ([peer_yaml(STRICT)], True),
        ([peer_yaml(STRICT, namespace=ROOT)], True),
        ([peer_yaml(STRICT, namespace="bank")], False),
        ([peer_yaml(STRICT, namespace=ROOT), peer_yaml("mtls: {mode: PERMISSIVE}")], False),
        ([peer_yaml(STRICT, namespace=ROOT), peer_yaml("mtls: {mode: UNSET}")], True),
        ([peer_yaml(STRICT, namespace=ROOT), peer_yaml("")], True),
        ([peer_yaml("selector: {matchLabels: {app: web}}, " + STRICT)], True),
        ([peer_yaml("selector: {matchLabels: {app: other}}, " + STRICT)], False),
        (
            [
                peer_yaml(STRICT),
                peer_yaml("selector: {matchLabels: {app: web}}, mtls: {mode: DISABLE}", "w"),
            ],
            False,
        ),
        (
            [
                peer_yaml(STRICT, "newer", created="2026-02-01T00:00:00Z"),
                peer_yaml("mtls: {mode: PERMISSIVE}", "older"),
            ],
            False,
        ),
        ([peer_yaml("mtls: {mode: STRICTT}")], True),
    ],
)
def test_strict_is_a_deny_of_those_without_identity(policies: list[str], strict: bool) -> None:
    found = translated(POD, *policies)
    assert (STATIC in workload(found).authorization_policies) is strict
    assert allows(found, None) is not strict
    assert allows(found, "anyone")
    assert {each.key for each in found.state.policies} == ({STATIC} if policies else set())


PORTS = "selector: {matchLabels: {app: web}}, portLevelMtls: {8080: {mode: %s}}"


@pytest.mark.parametrize(
    ("policies", "plain_8080", "plain_80"),
    [
        ([peer_yaml(PORTS % "STRICT", "w")], False, True),
        ([peer_yaml(PORTS % "PERMISSIVE" + ", " + STRICT, "w")], True, False),
        ([peer_yaml(PORTS % "STRICT" + ", " + STRICT, "w")], False, False),
        ([peer_yaml(STRICT), peer_yaml(PORTS % "PERMISSIVE", "w")], True, False),
        ([peer_yaml(STRICT, namespace=ROOT), peer_yaml(PORTS % "DISABLE", "w")], True, False),
        ([peer_yaml(STRICT), peer_yaml(PORTS % "STRICT", "w")], False, False),
        ([peer_yaml(PORTS % "PERMISSIVE", "w")], True, True),
        (
            [peer_yaml(STRICT), peer_yaml(PORTS % "STRICT" + ", mtls: {mode: PERMISSIVE}", "w")],
            False,
            True,
        ),
    ],
)
def test_ports_differ_from_their_workloads_mode(
    policies: list[str], plain_8080: bool, plain_80: bool
) -> None:
    found = translated(POD, *policies)
    assert (allows(found, None, 8080), allows(found, None, 80)) == (plain_8080, plain_80)
    assert allows(found, "anyone", 8080)
    assert allows(found, "anyone", 80)
    # Every policy that the workload names is there.
    Snapshot.of(found.state)
    assert set(workload(found).authorization_policies) <= {e.key for e in found.state.policies}
