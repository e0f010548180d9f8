"""Policies compiled for speed: rules found by what they ask for, tests made when needed.

A mesh may have a hundred thousand rules of which one connection can match a
few. A rule with a clause that asks for certain principals can only match a
connection that has one of them, so it is filed under those, and tried only for
such connections; accounts, namespaces, ports and addresses alike. Prefixes are
filed by their length: a connection is looked up by its own text cut to each
length that occurs (suffixes and address ranges likewise). Only rules without
any such clause are tried always.

A change of a few policies does not build all of that anew: what was removed
is passed over, what was added stands in a small index beside the large one,
until enough has changed. What is found is the first policy by key that
matches, as a plain loop over the sorted policies would find it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from enum import IntEnum
from operator import attrgetter
from typing import NamedTuple

from meshbpf.agent.core.address import IPNetwork, prefix_bits
from meshbpf.agent.core.authz_match import Facts, Test, always, rule_test
from meshbpf.agent.core.policy import (
    Authorization,
    Clause,
    Match,
    MatchKind,
    PolicyAction,
    Rule,
    StringMatch,
)


class _Kind(IntEnum):
    """What rules are filed by, most telling first."""

    PRINCIPAL = 0
    PRINCIPAL_PREFIX = 1
    PRINCIPAL_SUFFIX = 2
    ACCOUNT = 3
    SOURCE = 4
    NAMESPACE = 5
    NAMESPACE_PREFIX = 6
    NAMESPACE_SUFFIX = 7
    PORT = 8
    DESTINATION = 9


class _Shape(NamedTuple):
    """How a connection is cut for a look-up; `size` is a text's length or an address' shift."""

    kind: _Kind
    size: int = 0


_Key = tuple[_Shape, Hashable]
_BY_KEY = attrgetter("key")


class _Entry:
    """One rule. Its test is made when a connection first comes near it."""

    __slots__ = ("_rule", "_test", "policy")

    def __init__(self, policy: Authorization, rule: Rule | None) -> None:
        self.policy = policy
        self._rule = rule
        self._test: Test | None = always if rule is None else None

    def matches(self, facts: Facts) -> bool:
        test = self._test
        if test is None:
            test = self._test = rule_test(self._rule or ())
        return test(facts)


class _Filed(NamedTuple):
    """An entry, and the keys under which it stands; None: it is tried always."""

    entry: _Entry
    keys: Sequence[_Key] | None


class _Tables:
    """The rules of some policies, filed. Never changes once it is built."""

    __slots__ = ("_probes", "_rest", "policies")

    def __init__(self, policies: Iterable[Authorization]) -> None:
        self.policies = sorted(policies, key=_BY_KEY)
        tables: dict[_Shape, dict[Hashable, list[_Entry]]] = {}
        self._rest: list[_Entry] = []
        for policy in self.policies:
            for entry, keys in _filed(policy):
                if keys is None:
                    self._rest.append(entry)
                    continue
                for shape, value in keys:
                    table = tables.get(shape)
                    if table is None:
                        table = tables[shape] = {}
                    found = table.get(value)
                    if found is None:
                        table[value] = [entry]
                    else:
                        found.append(entry)
        self._probes = [(_probe(shape), tables[shape]) for shape in sorted(tables)]

    def candidates(self, facts: Facts) -> Iterator[Sequence[_Entry]]:
        """Lists of what could match, each sorted by its policies' keys."""
        for probe, table in self._probes:
            found = table.get(probe(facts))
            if found is not None:
                yield found
        if self._rest:
            yield self._rest


class RuleIndex:
    """The rules of some policies of one action; made from scratch or out of an earlier one."""

    __slots__ = ("_added", "_large", "_large_ids", "_removed")

    def __init__(self, policies: Iterable[Authorization]) -> None:
        self._large = _Tables(policies)
        self._added: _Tables | None = None
        self._removed: frozenset[int] = frozenset()
        # By identity: comparing large policies takes long. `_large` keeps them alive.
        self._large_ids = frozenset(map(id, self._large.policies))

    def updated(self, policies: Sequence[Authorization]) -> RuleIndex:
        """The index of `policies`, for the price of what differs if that is little."""
        large = self._large_ids
        removed = large.difference(map(id, policies))
        added = [policy for policy in policies if id(policy) not in large]
        if len(removed) + len(added) > max(_SMALL_CHANGE, len(large) // _LARGE_FRACTION):
            return RuleIndex(policies)
        fresh = RuleIndex.__new__(RuleIndex)
        fresh._large, fresh._large_ids, fresh._removed = self._large, large, removed
        fresh._added = _Tables(added) if added else None
        return fresh

    def first(self, facts: Facts) -> Authorization | None:
        """The first policy by key that matches."""
        best: Authorization | None = None
        for entries in self._candidates(facts):
            for entry in entries:  # sorted, so the first that matches is this list's best
                policy = entry.policy
                if best is not None and policy.key >= best.key:
                    break
                if id(policy) not in self._removed and entry.matches(facts):
                    best = policy
                    break
        return best

    def every(self, facts: Facts) -> tuple[Authorization, ...]:
        """All policies that match, by key."""
        found = {
            entry.policy.key: entry.policy
            for entries in self._candidates(facts)
            for entry in entries
            if id(entry.policy) not in self._removed and entry.matches(facts)
        }
        return tuple(found[key] for key in sorted(found))

    def _candidates(self, facts: Facts) -> Iterator[Sequence[_Entry]]:
        yield from self._large.candidates(facts)
        if self._added is not None:
            yield from self._added.candidates(facts)


_SMALL_CHANGE = 64
_LARGE_FRACTION = 16
"""From this part of the policies on, building anew is cheaper than looking twice."""


def _filed(policy: Authorization) -> Sequence[_Filed]:
    """A policy's rules with their keys: found once, and kept with the policy itself."""
    derived = policy.derived
    if not derived:
        derived.append(tuple(_file(policy)))
    filed: Sequence[_Filed] = derived[0]
    return filed


def _file(policy: Authorization) -> Iterator[_Filed]:
    if policy.inexpressible:
        if policy.action is PolicyAction.DENY:
            yield _Filed(_Entry(policy, None), None)
        return
    for rule in policy.rules:
        yield _Filed(_Entry(policy, rule), _rule_keys(rule))


def _rule_keys(rule: Rule) -> Sequence[_Key] | None:
    """The most telling keys of which a connection must have one; None when there are none."""
    found = [keys for keys in map(_clause_keys, rule) if keys is not None]
    # A clause tells as much as the least telling of its matches.
    return min(
        found, key=lambda keys: max((shape.kind for shape, _ in keys), default=0), default=None
    )


def _clause_keys(clause: Clause) -> Sequence[_Key] | None:
    if not clause:
        return None
    keys: list[_Key] = []
    for match in clause:
        if match == _NOTHING:
            continue  # holds for nothing, so it needs no key
        wanted = _match_keys(match)
        if not wanted:
            return None
        keys += wanted
    return keys


def _match_keys(match: Match) -> Sequence[_Key]:
    """Those of one field, the most telling that has any."""
    return (
        _text_keys(_Kind.PRINCIPAL, match.principals)
        or [(_ACCOUNT, (a.namespace, a.service_account)) for a in match.service_accounts]
        or _network_keys(_Kind.SOURCE, match.source_ips)
        or _text_keys(_Kind.NAMESPACE, match.namespaces)
        or [(_PORT, port) for port in match.destination_ports]
        or _network_keys(_Kind.DESTINATION, match.destination_ips)
    )


def _text_keys(exact: _Kind, values: Sequence[StringMatch]) -> Sequence[_Key]:
    """The texts that are asked for; none when any text will do."""
    keys: list[_Key] = []
    for value in values:
        match value.kind:
            case MatchKind.EXACT:
                keys.append((_Shape(exact), value.value))
            case MatchKind.PREFIX:
                keys.append((_Shape(_Kind(exact + 1), len(value.value)), value.value))
            case MatchKind.SUFFIX:
                keys.append((_Shape(_Kind(exact + 2), len(value.value)), value.value))
            case MatchKind.PRESENCE:
                return ()
    return keys


def _network_keys(kind: _Kind, values: Sequence[IPNetwork]) -> Sequence[_Key]:
    keys: list[_Key] = []
    for network in values:
        shift, value = prefix_bits(network)
        keys.append((_Shape(kind, shift), value))
    return keys


_ACCOUNT = _Shape(_Kind.ACCOUNT)
_PORT = _Shape(_Kind.PORT)
_NOTHING = Match()


def _probe(shape: _Shape) -> Callable[[Facts], Hashable]:
    """What of a connection is looked up in the table of this shape; None is in no table."""
    size = shape.size
    match shape.kind:
        case _Kind.PRINCIPAL:
            return lambda facts: facts.principal
        case _Kind.PRINCIPAL_PREFIX:
            return lambda facts: facts.principal and facts.principal[:size]
        case _Kind.PRINCIPAL_SUFFIX:
            return lambda facts: facts.principal and _ending(facts.principal, size)
        case _Kind.ACCOUNT:
            return lambda facts: (facts.namespace, facts.service_account)
        case _Kind.SOURCE:
            return lambda facts: facts.source >> size
        case _Kind.NAMESPACE:
            return lambda facts: facts.namespace
        case _Kind.NAMESPACE_PREFIX:
            return lambda facts: facts.namespace[:size]
        case _Kind.NAMESPACE_SUFFIX:
            return lambda facts: _ending(facts.namespace, size)
        case _Kind.PORT:
            return lambda facts: facts.port
        case _Kind.DESTINATION:
            return lambda facts: facts.destination >> size


def _ending(text: str, size: int) -> str:
    return text[max(len(text) - size, 0) :]
