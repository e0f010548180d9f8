"""What policies mean: the rules of evaluation, one case each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from meshbpf.agent.core.address import IPNetwork
from meshbpf.agent.core.authz import ConnectionFacts, PolicySet, authorize
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.policy import (
    Authorization,
    Match,
    MatchKind,
    PolicyAction,
    PolicyScope,
    ServiceAccountMatch,
    StringMatch,
)
from tests.unit.core.builders import ip, mesh, pod

pytestmark = pytest.mark.compat

ALICE = SpiffeId.parse("spiffe://cluster.local/ns/web/sa/alice")
FACTS = ConnectionFacts(ALICE, ip("10.0.0.1"), ip("10.0.0.2"), 8080)
PLAINTEXT = replace(FACTS, source_identity=None)
V6 = ConnectionFacts(ALICE, ip("fd00::1"), ip("fd00::2"), 8080)


def exact(text: str) -> StringMatch:
    return StringMatch(MatchKind.EXACT, text)


def net(text: str) -> IPNetwork:
    from ipaddress import ip_network

    return ip_network(text)


def policy(action: PolicyAction, *rules: Any, name: str = "p", **fields: Any) -> Authorization:
    return Authorization(name, "default", PolicyScope.NAMESPACE, action, rules, **fields)


def allow(*rules: Any, **fields: Any) -> Authorization:
    return policy(PolicyAction.ALLOW, *rules, **fields)


def deny(*rules: Any, **fields: Any) -> Authorization:
    return policy(PolicyAction.DENY, *rules, **fields)


def one(**fields: Any) -> Any:
    """A rule of one clause of one match."""
    return ((Match(**fields),),)


NOBODY = one(principals=(exact("cluster.local/ns/x/sa/nobody"),))
PRESENCE = StringMatch(MatchKind.PRESENCE)

FIELDS = [
    # match, facts, holds
    ({"namespaces": (exact("web"),)}, FACTS, True),
    ({"namespaces": (exact("we"),)}, FACTS, False),
    ({"namespaces": (StringMatch(MatchKind.PREFIX, "we"),)}, FACTS, True),
    ({"namespaces": (StringMatch(MatchKind.SUFFIX, "eb"),)}, FACTS, True),
    ({"namespaces": (PRESENCE,)}, FACTS, True),
    ({"namespaces": (PRESENCE,)}, PLAINTEXT, False),
    ({"namespaces": (exact(""),)}, PLAINTEXT, True),
    ({"not_namespaces": (exact("web"),)}, FACTS, False),
    ({"not_namespaces": (exact("web"),)}, PLAINTEXT, True),
    ({"principals": (exact("cluster.local/ns/web/sa/alice"),)}, FACTS, True),
    ({"principals": (exact("spiffe://cluster.local/ns/web/sa/alice"),)}, FACTS, False),
    ({"principals": (StringMatch(MatchKind.PREFIX, "cluster.local/"),)}, FACTS, True),
    ({"principals": (StringMatch(MatchKind.SUFFIX, "/sa/alice"),)}, FACTS, True),
    ({"principals": (PRESENCE,)}, FACTS, True),
    ({"principals": (PRESENCE,)}, PLAINTEXT, False),
    ({"principals": (StringMatch(MatchKind.PREFIX, ""),)}, PLAINTEXT, False),
    ({"not_principals": (PRESENCE,)}, PLAINTEXT, True),
    ({"not_principals": (PRESENCE,)}, FACTS, False),
    ({"service_accounts": (ServiceAccountMatch("web", "alice"),)}, FACTS, True),
    ({"service_accounts": (ServiceAccountMatch("web", "bob"),)}, FACTS, False),
    ({"service_accounts": (ServiceAccountMatch("default", "alice"),)}, FACTS, False),
    ({"service_accounts": (ServiceAccountMatch("web", "alice"),)}, PLAINTEXT, False),
    ({"not_service_accounts": (ServiceAccountMatch("web", "alice"),)}, FACTS, False),
    ({"not_service_accounts": (ServiceAccountMatch("web", "alice"),)}, PLAINTEXT, True),
    ({"source_ips": (net("10.0.0.0/31"),)}, FACTS, True),
    ({"source_ips": (net("10.0.0.2/32"),)}, FACTS, False),
    ({"source_ips": (net("0.0.0.0/0"),)}, FACTS, True),
    ({"source_ips": (net("0.0.0.0/0"),)}, V6, False),
    ({"source_ips": (net("::/0"),)}, V6, True),
    ({"source_ips": (net("::/0"),)}, FACTS, False),
    ({"not_source_ips": (net("fd00::/16"),)}, V6, False),
    ({"not_source_ips": (net("fd00::/16"),)}, FACTS, True),
    ({"destination_ips": (net("10.0.0.2/32"),)}, FACTS, True),
    ({"destination_ips": (net("10.0.0.1/32"),)}, FACTS, False),
    ({"not_destination_ips": (net("fd00::2/128"),)}, V6, False),
    ({"destination_ports": (80, 8080)}, FACTS, True),
    ({"destination_ports": (80,)}, FACTS, False),
    ({"not_destination_ports": (8080,)}, FACTS, False),
    ({"not_destination_ports": (80, 81)}, FACTS, True),
    # all fields must hold
    ({"destination_ports": (8080,), "namespaces": (exact("web"),)}, FACTS, True),
    ({"destination_ports": (8080,), "namespaces": (exact("x"),)}, FACTS, False),
    ({"destination_ports": (8080,), "not_destination_ports": (8080,)}, FACTS, False),
    # a match without a field holds for nothing
    ({}, FACTS, False),
]


@pytest.mark.parametrize(("match", "facts", "holds"), FIELDS)
def test_field_of_a_match(match: dict[str, Any], facts: ConnectionFacts, holds: bool) -> None:
    assert authorize([deny(one(**match))], facts).allowed is not holds
    assert authorize([allow(one(**match))], facts).allowed is holds


HOLDS, FAILS = Match(destination_ports=(8080,)), Match(destination_ports=(1,))

RULES = [
    ((), False),  # no rules: never
    (((),), True),  # a rule without clauses: always
    ((((),),), True),  # an empty clause holds
    ((((), (HOLDS,)),), True),
    ((((), (FAILS,)),), False),
    ((((HOLDS,), (FAILS,)),), False),  # clauses: all
    ((((HOLDS,), (HOLDS,)),), True),
    ((((FAILS, HOLDS),),), True),  # matches: any
    ((((FAILS, FAILS),),), False),
    ((((FAILS,),), ((HOLDS,),)), True),  # rules: any
    ((((Match(),),),), False),
    ((((Match(), HOLDS),),), True),
]


@pytest.mark.parametrize(("rules", "matches"), RULES)
def test_nesting_of_rules(rules: Any, matches: bool) -> None:
    assert authorize([deny(*rules)], FACTS).allowed is not matches
    assert authorize([allow(*rules)], FACTS).allowed is matches


def test_without_policies_everything_is_allowed() -> None:
    assert authorize([], FACTS).allowed


def test_deny_beats_allow_whatever_the_order() -> None:
    for policies in ([allow((), name="a"), deny((), name="d")], [deny((), name="d"), allow(())]):
        decision = authorize(policies, FACTS)
        assert not decision.allowed
        assert decision.policy == "default/d"
        assert "DENY policy default/d" in decision.reason


def test_a_deny_that_does_not_match_allows() -> None:
    decision = authorize([deny(NOBODY)], FACTS)
    assert decision.allowed
    assert decision.policy is None


def test_one_allow_of_several_is_enough_and_is_named() -> None:
    decision = authorize([allow(NOBODY, name="a"), allow(one(destination_ports=(8080,)))], FACTS)
    assert decision.allowed
    assert decision.policy == "default/p"


def test_the_first_policy_by_name_is_named_however_the_rules_are_filed() -> None:
    by_port = deny(one(destination_ports=(8080,)), name="port")
    by_principal = deny(one(principals=(exact(ALICE.principal),)), name="principal")
    by_account = deny(one(service_accounts=(ServiceAccountMatch("web", "alice"),)), name="account")
    by_namespace = deny(one(namespaces=(exact("web"),)), name="namespace")
    by_address = deny(one(source_ips=(net("10.0.0.0/8"),)), name="address")
    kinds = [by_port, by_principal, by_account, by_namespace, by_address]
    for first in kinds:
        renamed = replace(first, name="a-first")
        rest = [each for each in kinds if each is not first]
        assert authorize([*rest, renamed], FACTS).policy == renamed.key


def test_an_allow_without_rules_denies_all() -> None:
    decision = authorize([allow()], FACTS)
    assert not decision.allowed
    assert decision.reason == "no ALLOW policy matches"


def test_strict_mutual_tls_refuses_plaintext_alone() -> None:
    strict = deny(one(not_principals=(PRESENCE,)), name="istio_converted_static_strict")
    assert authorize([strict], FACTS).allowed
    assert not authorize([strict], PLAINTEXT).allowed


def test_dry_run_is_reported_and_changes_nothing() -> None:
    decision = authorize([deny((), dry_run=True, name="d"), allow(dry_run=True, name="a")], FACTS)
    assert decision.allowed
    assert decision.dry_run == (
        "default/d would deny",
        "no dry-run ALLOW policy matches: would deny",
    )


def test_dry_run_allow_does_not_make_allowing_necessary() -> None:
    assert authorize([allow(NOBODY, dry_run=True)], FACTS).allowed
    decision = authorize([allow((), dry_run=True), deny(())], FACTS)
    assert not decision.allowed
    assert decision.dry_run == ("default/p would allow",)


def test_dry_run_allow_that_fails_is_no_news_beside_an_enforced_one() -> None:
    decision = authorize([allow(NOBODY, dry_run=True), allow((), name="real")], FACTS)
    assert decision.allowed
    assert decision.dry_run == ()


@pytest.mark.parametrize(("action", "allowed"), [(deny, False), (allow, False)])
def test_inexpressible_policy_fails_closed(action: Any, allowed: bool) -> None:
    decision = authorize([action((), inexpressible="a field of tomorrow")], FACTS)
    assert decision.allowed is allowed


def test_workload_gets_its_namespaces_the_global_and_its_own_policies() -> None:
    def scoped(name: str, namespace: str, scope: PolicyScope) -> Authorization:
        return Authorization(name, namespace, scope, PolicyAction.DENY)

    mine = pod("mine", "10.0.0.1", authorization_policies=("other/picked",))
    snapshot = mesh(
        mine,
        scoped("here", "default", PolicyScope.NAMESPACE),
        scoped("there", "other", PolicyScope.NAMESPACE),
        scoped("everywhere", "istio-system", PolicyScope.GLOBAL),
        scoped("picked", "other", PolicyScope.WORKLOAD_SELECTOR),
        scoped("unpicked", "default", PolicyScope.WORKLOAD_SELECTOR),
    )
    found = snapshot.policies_for(mine)
    assert {p.key for p in found} == {"default/here", "istio-system/everywhere", "other/picked"}
    assert isinstance(found, PolicySet)
    assert snapshot.policies_for(mine) is found


def test_policy_that_a_workload_names_and_nobody_knows_lets_nothing_in() -> None:
    mine = pod("mine", "10.0.0.1", authorization_policies=("default/later",))
    decision = authorize(mesh(mine).policies_for(mine), FACTS)
    assert not decision.allowed
    assert decision.policy == "default/later"
