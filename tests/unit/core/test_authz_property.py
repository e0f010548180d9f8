"""The indexed evaluator answers as a plain loop over the policies would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from ipaddress import ip_network
from typing import TypeVar

from hypothesis import given, settings
from hypothesis import strategies as st

from meshbpf.agent.core.authz import ConnectionFacts, PolicyGroup, PolicySet, authorize
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
from tests.unit.core.builders import ip

T = TypeVar("T")

# Few values, so that policies and connections meet often.
NAMESPACES = ["a", "ab", "b"]
ACCOUNTS = ["x", "y"]
PRINCIPALS = [f"td/ns/{n}/sa/{s}" for n in NAMESPACES for s in ACCOUNTS]
IPS = ["10.0.0.1", "10.0.1.1", "fd00::1", "fd00::1:0"]
NETS = ["10.0.0.0/24", "10.0.0.1/32", "0.0.0.0/0", "::/0", "fd00::/112", "fd00::1/128"]
PORTS = [80, 81, 8080]


def texts(values: list[str]) -> st.SearchStrategy[tuple[StringMatch, ...]]:
    parts = values + [v[:2] for v in values] + [v[-3:] for v in values] + [""]
    match = st.builds(
        StringMatch,
        st.sampled_from([MatchKind.EXACT, MatchKind.PREFIX, MatchKind.SUFFIX]),
        st.sampled_from(parts),
    ) | st.just(StringMatch(MatchKind.PRESENCE))
    return few(match)


def few(values: st.SearchStrategy[T]) -> st.SearchStrategy[tuple[T, ...]]:
    return st.just(()) | st.lists(values, max_size=2).map(tuple)


accounts = few(
    st.builds(ServiceAccountMatch, st.sampled_from(NAMESPACES), st.sampled_from(ACCOUNTS))
)
nets = few(st.sampled_from(NETS).map(ip_network))
ports = few(st.sampled_from(PORTS))
matches = st.builds(
    Match,
    texts(NAMESPACES),
    texts(NAMESPACES),
    accounts,
    accounts,
    texts(PRINCIPALS),
    texts(PRINCIPALS),
    nets,
    nets,
    nets,
    nets,
    ports,
    ports,
)
# Matches with one field are what policies mostly have, and what the index files.
simple = st.one_of(
    st.builds(Match, principals=texts(PRINCIPALS)),
    st.builds(Match, namespaces=texts(NAMESPACES)),
    st.builds(Match, service_accounts=accounts),
    st.builds(Match, destination_ports=ports),
    st.builds(Match, destination_ports=ports, principals=texts(PRINCIPALS)),
)
rules = st.lists(
    st.lists(st.lists(simple | matches, max_size=3).map(tuple), max_size=3).map(tuple), max_size=3
).map(tuple)
policies = st.lists(
    st.builds(
        Authorization,
        name=st.sampled_from("pqrstuvw"),
        namespace=st.just("ns"),
        scope=st.just(PolicyScope.GLOBAL),
        action=st.sampled_from(PolicyAction),
        rules=rules,
        dry_run=st.sampled_from([False, False, True]),
        inexpressible=st.sampled_from(["", "", "", "", "unknown"]),
    ),
    max_size=6,
    unique_by=lambda p: p.name,
)
connections = st.builds(
    ConnectionFacts,
    st.none()
    | st.builds(SpiffeId, st.just("td"), st.sampled_from(NAMESPACES), st.sampled_from(ACCOUNTS)),
    st.sampled_from(IPS).map(ip),
    st.sampled_from(IPS).map(ip),
    st.sampled_from(PORTS),
)


def plain_match(match: Match, facts: ConnectionFacts) -> bool:
    who = facts.source_identity
    namespace = "" if who is None else who.namespace
    if match == Match():
        return False

    def principal(wanted: StringMatch) -> bool:
        return who is not None and wanted.matches(str(who).removeprefix("spiffe://"))

    def account(wanted: ServiceAccountMatch) -> bool:
        return who is not None and (who.namespace, who.service_account) == (
            wanted.namespace,
            wanted.service_account,
        )

    def holds(yes: Sequence[T], no: Sequence[T], test: Callable[[T], bool]) -> bool:
        return (not yes or any(map(test, yes))) and not any(map(test, no))

    return (
        holds(match.namespaces, match.not_namespaces, lambda m: m.matches(namespace))
        and holds(match.principals, match.not_principals, principal)
        and holds(match.service_accounts, match.not_service_accounts, account)
        and holds(match.source_ips, match.not_source_ips, lambda n: facts.source_ip in n)
        and holds(
            match.destination_ips, match.not_destination_ips, lambda n: facts.destination_ip in n
        )
        and holds(
            match.destination_ports,
            match.not_destination_ports,
            lambda p: p == facts.destination_port,
        )
    )


def plain_policy(policy: Authorization, facts: ConnectionFacts) -> bool:
    if policy.inexpressible:
        return policy.action is PolicyAction.DENY
    return any(
        all(not clause or any(plain_match(m, facts) for m in clause) for clause in rule)
        for rule in policy.rules
    )


def plain_decision(
    given_policies: Sequence[Authorization], facts: ConnectionFacts
) -> tuple[bool, str | None]:
    enforced = sorted((p for p in given_policies if not p.dry_run), key=lambda p: p.key)
    for policy in enforced:
        if policy.action is PolicyAction.DENY and plain_policy(policy, facts):
            return False, policy.key
    allows = [p for p in enforced if p.action is PolicyAction.ALLOW]
    if not allows:
        return True, None
    for policy in allows:
        if plain_policy(policy, facts):
            return True, policy.key
    return False, None


@settings(max_examples=300, deadline=None)
@given(policies, st.lists(connections, min_size=1, max_size=6))
def test_index_answers_as_the_plain_model(
    drawn: list[Authorization], facts: list[ConnectionFacts]
) -> None:
    for each in facts:
        decision = authorize(drawn, each)
        assert (decision.allowed, decision.policy) == plain_decision(drawn, each)
        rehearsed = {
            p.key for p in drawn if p.dry_run and plain_policy(p, each)
        }  # the lines start with the policy's key
        named = {line.partition(" ")[0] for line in decision.dry_run if "/" in line}
        assert named == rehearsed


@settings(max_examples=100, deadline=None)
@given(st.lists(policies, min_size=2, max_size=4), st.lists(connections, min_size=1, max_size=4))
def test_a_group_that_succeeds_another_answers_as_if_it_were_the_first(
    states: list[list[Authorization]], facts: list[ConnectionFacts]
) -> None:
    group: PolicyGroup | None = None
    kept: dict[str, Authorization] = {}
    for drawn in states:
        # Half of a state stays what it was, as the very same objects.
        kept = {k: p for k, p in kept.items() if len(k) % 2} | {p.key: p for p in drawn}
        group = PolicyGroup.of(tuple(kept.values()), group)
        decide = PolicySet.of_groups([group]).decide
        for each in facts:
            decision = decide(each)
            assert (decision.allowed, decision.policy) == plain_decision([*kept.values()], each)


@settings(max_examples=100, deadline=None)
@given(policies, policies, connections)
def test_groups_answer_together_as_all_their_policies_would(
    one: list[Authorization], other: list[Authorization], facts: ConnectionFacts
) -> None:
    moved = [replace(p, namespace="b") for p in other]
    groups = [PolicyGroup.of(tuple(each)) for each in (one, moved)]
    decision = PolicySet.of_groups(groups).decide(facts)
    everything = [policy for group in groups for policy in group]
    assert (decision.allowed, decision.policy) == plain_decision(everything, facts)
