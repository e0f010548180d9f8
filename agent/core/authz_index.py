"""Policies compiled for speed: tests as closures, rules found by key.

A mesh may have thousands of rules of which one connection can match a few.
A rule with a clause that asks for exact principals (or accounts, ports,
namespaces) can only match a connection that has one of them, so the rule is
filed under those keys and tried only for such connections. The rules that
have no such clause are tried always. What is found is the first policy in
the given order, as a plain loop over all of them would find it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple, TypeVar

from meshbpf.agent.core.address import IPNetwork, prefix_bits
from meshbpf.agent.core.policy import (
    Authorization,
    Clause,
    Match,
    MatchKind,
    PolicyAction,
    Rule,
    ServiceAccountMatch,
    StringMatch,
)


class Facts(NamedTuple):
    """A connection in the form that the tests read; addresses as `address_bits`."""

    principal: str | None
    namespace: str
    service_account: str | None
    source: int
    destination: int
    port: int


Test = Callable[[Facts], bool]
T = TypeVar("T")


class _Entry(NamedTuple):
    order: int
    policy: Authorization
    test: Test


class _Kind(IntEnum):
    PRINCIPAL = 0
    ACCOUNT = 1
    PORT = 2
    NAMESPACE = 3


class RuleIndex:
    """The rules of some policies, filed by what they ask for."""

    __slots__ = ("_filed", "_rest")

    def __init__(self, policies: Iterable[Authorization]) -> None:
        self._filed: tuple[dict[Hashable, list[_Entry]], ...] = tuple(
            defaultdict(list) for _ in _Kind
        )
        self._rest: list[_Entry] = []
        for order, policy in enumerate(policies):
            if policy.inexpressible:
                if policy.action is PolicyAction.DENY:
                    self._rest.append(_Entry(order, policy, _always))
                continue
            for rule in policy.rules:
                self._file(rule, _Entry(order, policy, _rule_test(rule)))

    def _file(self, rule: Rule, entry: _Entry) -> None:
        for kind in _Kind:
            for clause in rule:
                keys = _clause_keys(kind, clause)
                if keys is not None:
                    for key in keys:
                        self._filed[kind][key].append(entry)
                    return
        self._rest.append(entry)

    def _candidates(self, facts: Facts) -> Iterable[Sequence[_Entry]]:
        principals, accounts, ports, namespaces = self._filed
        if principals and (found := principals.get(facts.principal)) is not None:
            yield found
        if accounts:
            found = accounts.get((facts.namespace, facts.service_account))
            if found is not None:
                yield found
        if ports and (found := ports.get(facts.port)) is not None:
            yield found
        if namespaces and (found := namespaces.get(facts.namespace)) is not None:
            yield found
        if self._rest:
            yield self._rest

    def first(self, facts: Facts) -> Authorization | None:
        """The first policy in order that matches."""
        best: _Entry | None = None
        for entries in self._candidates(facts):
            for entry in entries:  # in order, so the first that matches is this list's best
                if best is not None and entry.order >= best.order:
                    break
                if entry.test(facts):
                    best = entry
                    break
        return None if best is None else best.policy

    def every(self, facts: Facts) -> tuple[Authorization, ...]:
        """All policies that match, in order."""
        found = {
            entry.order: entry.policy
            for entries in self._candidates(facts)
            for entry in entries
            if entry.test(facts)
        }
        return tuple(found[order] for order in sorted(found))


def _always(_: Facts) -> bool:
    return True


def _never(_: Facts) -> bool:
    return False


def _clause_keys(kind: _Kind, clause: Clause) -> set[Hashable] | None:
    """The keys of which a connection must have one to pass; None when there is no such set."""
    if not clause:
        return None
    keys: set[Hashable] = set()
    for match in clause:
        if match == Match():
            continue  # holds for nothing, so it needs no key
        wanted = _match_keys(kind, match)
        if not wanted:
            return None
        keys |= wanted
    return keys


def _match_keys(kind: _Kind, match: Match) -> set[Hashable]:
    match kind:
        case _Kind.PRINCIPAL:
            return _exact(match.principals)
        case _Kind.ACCOUNT:
            return {(a.namespace, a.service_account) for a in match.service_accounts}
        case _Kind.PORT:
            return set(match.destination_ports)
        case _Kind.NAMESPACE:
            return _exact(match.namespaces)


def _exact(values: Sequence[StringMatch]) -> set[Hashable]:
    """The texts, if all the values are exact; else the empty set."""
    if any(value.kind is not MatchKind.EXACT for value in values):
        return set()
    return {value.value for value in values}


def _rule_test(rule: Rule) -> Test:
    clauses = tuple(tuple(_match_test(match) for match in clause) for clause in rule if clause)
    if not clauses:
        return _always
    if len(clauses) == 1 and len(clauses[0]) == 1:
        return clauses[0][0]

    def test(facts: Facts) -> bool:
        for clause in clauses:
            for match in clause:
                if match(facts):
                    break
            else:
                return False
        return True

    return test


def _match_test(match: Match) -> Test:
    fields = (
        # Cheapest first; all must hold, so the order is free.
        *_both(_port_test, match.destination_ports, match.not_destination_ports),
        *_both(_namespace_test, match.namespaces, match.not_namespaces),
        *_both(_principal_test, match.principals, match.not_principals),
        *_both(_account_test, match.service_accounts, match.not_service_accounts),
        *_both(_source_test, match.source_ips, match.not_source_ips),
        *_both(_destination_test, match.destination_ips, match.not_destination_ips),
    )
    if not fields:
        return _never
    if len(fields) == 1:
        return fields[0]

    def test(facts: Facts) -> bool:
        for holds in fields:  # noqa: SIM110 - a generator costs more than the tests
            if not holds(facts):
                return False
        return True

    return test


def _both(
    make: Callable[[Sequence[T]], Test], wanted: Sequence[T], unwanted: Sequence[T]
) -> Iterable[Test]:
    if wanted:
        yield make(wanted)
    if unwanted:
        inner = make(unwanted)
        yield lambda facts: not inner(facts)


def _port_test(values: Sequence[int]) -> Test:
    ports = frozenset(values)
    return lambda facts: facts.port in ports


def _namespace_test(values: Sequence[StringMatch]) -> Test:
    matches = text_test(values)
    return lambda facts: matches(facts.namespace)


def _principal_test(values: Sequence[StringMatch]) -> Test:
    matches = text_test(values)
    return lambda facts: facts.principal is not None and matches(facts.principal)


def _account_test(values: Sequence[ServiceAccountMatch]) -> Test:
    accounts = frozenset((value.namespace, value.service_account) for value in values)
    return lambda facts: (facts.namespace, facts.service_account) in accounts


def _source_test(values: Sequence[IPNetwork]) -> Test:
    holds = address_test(values)
    return lambda facts: holds(facts.source)


def _destination_test(values: Sequence[IPNetwork]) -> Test:
    holds = address_test(values)
    return lambda facts: holds(facts.destination)


def text_test(values: Sequence[StringMatch]) -> Callable[[str], bool]:
    """Whether a text passes any of `values`."""
    exact = frozenset(v.value for v in values if v.kind is MatchKind.EXACT)
    if all(v.kind is MatchKind.EXACT for v in values):
        return exact.__contains__
    prefixes = tuple(v.value for v in values if v.kind is MatchKind.PREFIX)
    suffixes = tuple(v.value for v in values if v.kind is MatchKind.SUFFIX)
    presence = any(v.kind is MatchKind.PRESENCE for v in values)

    def test(text: str) -> bool:
        return (
            text in exact
            or text.startswith(prefixes)
            or text.endswith(suffixes)
            or (presence and text != "")
        )

    return test


def address_test(values: Sequence[IPNetwork]) -> Callable[[int], bool]:
    """Whether an address, as `address_bits`, is in any of `values`."""
    by_shift: dict[int, set[int]] = defaultdict(set)
    for network in values:
        shift, value = prefix_bits(network)
        by_shift[shift].add(value)
    groups = tuple((shift, frozenset(found)) for shift, found in by_shift.items())

    def test(bits: int) -> bool:
        for shift, found in groups:  # noqa: SIM110 - as above
            if bits >> shift in found:
                return True
        return False

    return test
