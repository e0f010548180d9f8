"""The rules of policies as tests: closures over what they ask of a connection.

A test is made once and run for many connections, so all that can be decided
without one is decided when it is made: which fields there are, sets of exact
values, one comparison per length of address prefix.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from meshbpf.agent.core.address import IPNetwork, prefix_bits
from meshbpf.agent.core.policy import (
    Match,
    MatchKind,
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


def always(_: Facts) -> bool:
    """Of what matches every connection."""
    return True


def _never(_: Facts) -> bool:
    return False


def rule_test(rule: Rule) -> Test:
    """Whether all clauses hold."""
    clauses = tuple(tuple(_match_test(match) for match in clause) for clause in rule if clause)
    if not clauses:
        return always
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
