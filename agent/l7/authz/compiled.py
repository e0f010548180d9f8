"""Rules as closures over Facts, cheapest test first.

Made once when policies change, one set for HTTP and one for TCP. On TCP an
ALLOW rule that reads HTTP is left out, and the other actions lose the tests
that read HTTP: a narrower ALLOW, a wider DENY (Istio's `checkError`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from meshbpf.agent.core.address import IPNetwork
from meshbpf.agent.core.authz_match import address_test, text_test
from meshbpf.agent.core.policy import MatchKind, ServiceAccountMatch, StringMatch
from meshbpf.agent.l7.authz.facts import Facts
from meshbpf.agent.l7.authz.patterns import Glob, PathTemplate, RequestPrincipal
from meshbpf.agent.l7.authz.policy import (
    Action,
    Attribute,
    Condition,
    HttpPolicy,
    HttpRule,
    Pattern,
)

Holds = Callable[[Facts], bool]


class CompiledRule(NamedTuple):
    """A rule of a policy; `number` is -1 for a policy that is matched whole."""

    policy: HttpPolicy
    number: int
    holds: Holds

    @property
    def id(self) -> str:
        """As Istio names it for Envoy, so that its log parsers fit."""
        key = self.policy.key
        return f"ns[{key.namespace}]-policy[{key.name}]-rule[{max(self.number, 0)}]"


def compile_rules(policies: Iterable[HttpPolicy], *, tcp: bool) -> tuple[CompiledRule, ...]:
    """All rules that may match, in order."""
    found = []
    for policy in policies:
        if policy.inexpressible:
            if policy.action in (Action.DENY, Action.CUSTOM):
                found.append(CompiledRule(policy, -1, _always))
            continue
        for index, rule in enumerate(policy.rules):
            holds = _rule(rule, policy.action, tcp=tcp)
            if holds is not None:
                found.append(CompiledRule(policy, index, holds))
    return tuple(found)


def _always(_: Facts) -> bool:
    return True


def _rule(rule: HttpRule, action: Action, *, tcp: bool) -> Holds | None:
    """None when the rule cannot match."""
    if tcp:
        every = [*rule.conditions, *(t for tests in rule.sources + rule.operations for t in tests)]
        if action is Action.ALLOW and any(test.attribute.http_only for test in every):
            return None
    parts = [
        *_all_parts(rule.conditions, tcp=tcp),
        *_any(rule.operations, tcp=tcp),
        *_any(rule.sources, tcp=tcp),
    ]
    return _and(parts)


def _any(alternatives: Sequence[tuple[Condition, ...]], *, tcp: bool) -> list[Holds]:
    """One closure, or none where any of the alternatives is always true."""
    compiled = [_all_parts(tests, tcp=tcp) for tests in alternatives]
    if not all(compiled):
        return []
    choices = tuple(map(_and, compiled))
    if len(choices) < 2:
        return list(choices)

    def holds(facts: Facts) -> bool:
        for choice in choices:  # noqa: SIM110 - any() costs a generator each time
            if choice(facts):
                return True
        return False

    return [holds]


def _and(parts: Sequence[Holds]) -> Holds:
    if not parts:
        return _always
    if len(parts) == 1:
        return parts[0]
    fixed = tuple(parts)

    def holds(facts: Facts) -> bool:
        for part in fixed:  # noqa: SIM110 - as above
            if not part(facts):
                return False
        return True

    return holds


def _all_parts(tests: Iterable[Condition], *, tcp: bool) -> list[Holds]:
    parts = []
    for test in sorted(tests, key=lambda each: _COST[each.attribute]):
        if tcp and test.attribute.http_only:
            continue
        make = _MAKERS[test.attribute]
        if test.values:
            parts.append(make(test.values, test.path))
        if test.not_values:
            parts.append(_not(make(test.not_values, test.path)))
    return parts


def _not(holds: Holds) -> Holds:
    return lambda facts: not holds(facts)


# --- one maker for each kind of attribute


Maker = Callable[[Sequence[Pattern], tuple[str, ...]], Holds]


def _strings(values: Sequence[Pattern]) -> Callable[[str], bool]:
    return text_test([value for value in values if isinstance(value, StringMatch)])


def _principal(values: Sequence[Pattern], _: tuple[str, ...]) -> Holds:
    holds = _strings(values)
    # A caller without identity has no principal at all, not an empty one that
    # a suffix could match.
    return lambda facts: facts.principal != "" and holds(facts.principal)


def _namespace(values: Sequence[Pattern], _: tuple[str, ...]) -> Holds:
    holds = _globs(values)
    return lambda facts: facts.principal != "" and holds(facts.namespace)


def _trust_domain(values: Sequence[Pattern], _: tuple[str, ...]) -> Holds:
    holds = _globs(values)
    return lambda facts: facts.principal != "" and holds(facts.trust_domain)


def _globs(values: Sequence[Pattern]) -> Callable[[str], bool]:
    globs = [value for value in values if isinstance(value, Glob)]
    exact = frozenset(glob.text for glob in globs if "*" not in glob.text)
    regexes = tuple(glob.regex.fullmatch for glob in globs if "*" in glob.text)
    if not regexes:
        return exact.__contains__
    return lambda text: text in exact or any(match(text) for match in regexes)


def _account(values: Sequence[Pattern], _: tuple[str, ...]) -> Holds:
    wanted = frozenset(
        (value.namespace, value.service_account)
        for value in values
        if isinstance(value, ServiceAccountMatch)
    )
    return lambda facts: (facts.namespace, facts.account) in wanted


def _networks(values: Sequence[Pattern]) -> Callable[[int], bool]:
    return address_test([value for value in values if isinstance(value, IPNetwork)])


def _source(values: Sequence[Pattern], _: tuple[str, ...]) -> Holds:
    holds = _networks(values)
    return lambda facts: holds(facts.source)


def _remote(values: Sequence[Pattern], _: tuple[str, ...]) -> Holds:
    holds = _networks(values)
    return lambda facts: holds(facts.remote)


def _destination(values: Sequence[Pattern], _: tuple[str, ...]) -> Holds:
    holds = _networks(values)
    return lambda facts: holds(facts.destination)


def _port(values: Sequence[Pattern], _: tuple[str, ...]) -> Holds:
    ports = frozenset(value for value in values if isinstance(value, int))
    return lambda facts: facts.port in ports


def _sni(values: Sequence[Pattern], _: tuple[str, ...]) -> Holds:
    holds = _strings(values)
    return lambda facts: holds(facts.sni)


def _method(values: Sequence[Pattern], _: tuple[str, ...]) -> Holds:
    holds = _strings(values)
    return lambda facts: holds(facts.method)


def _host(values: Sequence[Pattern], _: tuple[str, ...]) -> Holds:
    holds = _strings(values)
    return lambda facts: holds(facts.host)


def _path(values: Sequence[Pattern], _: tuple[str, ...]) -> Holds:
    templates = tuple(v.regex.fullmatch for v in values if isinstance(v, PathTemplate))
    holds = _strings(values)
    if not templates:
        return lambda facts: holds(facts.path)
    return lambda facts: holds(facts.path) or any(match(facts.path) for match in templates)


def _header(values: Sequence[Pattern], path: tuple[str, ...]) -> Holds:
    (name,) = path
    strings = [value for value in values if isinstance(value, StringMatch)]
    if any(value.kind is MatchKind.PRESENCE for value in strings):
        # Unlike elsewhere, a header that is there and empty is present (Envoy's present_match).
        return lambda facts: name in facts.headers
    holds = text_test(strings)

    def test(facts: Facts) -> bool:
        found = facts.headers.get(name)
        return found is not None and holds(found)

    return test


def _request_principal(values: Sequence[Pattern], _: tuple[str, ...]) -> Holds:
    wanted = tuple(value for value in values if isinstance(value, RequestPrincipal))

    def test(facts: Facts) -> bool:
        issuer, subject = facts.claims.get("iss"), facts.claims.get("sub")
        if not isinstance(issuer, str) or not isinstance(subject, str):
            return False
        return any(w.issuer.matches(issuer) and w.subject.matches(subject) for w in wanted)

    return test


def _claim(values: Sequence[Pattern], path: tuple[str, ...]) -> Holds:
    holds = _strings(values)

    def test(facts: Facts) -> bool:
        found: Any = facts.claims
        for step in path:
            if not isinstance(found, dict):
                return False
            found = found.get(step)
        if isinstance(found, str):
            return holds(found)
        # Only texts and lists of texts are compared, as Envoy's string matcher does.
        return isinstance(found, list) and any(isinstance(x, str) and holds(x) for x in found)

    return test


def _audience(values: Sequence[Pattern], _: tuple[str, ...]) -> Holds:
    return _claim(values, ("aud",))


def _presenter(values: Sequence[Pattern], _: tuple[str, ...]) -> Holds:
    return _claim(values, ("azp",))


# In order of cost: a rule's tests may be asked in any order.
_MAKERS: dict[Attribute, Maker] = {
    Attribute.DESTINATION_PORT: _port,
    Attribute.METHOD: _method,
    Attribute.NAMESPACE: _namespace,
    Attribute.TRUST_DOMAIN: _trust_domain,
    Attribute.SERVICE_ACCOUNT: _account,
    Attribute.PRINCIPAL: _principal,
    Attribute.SNI: _sni,
    Attribute.SOURCE_IP: _source,
    Attribute.REMOTE_IP: _remote,
    Attribute.DESTINATION_IP: _destination,
    Attribute.HOST: _host,
    Attribute.PATH: _path,
    Attribute.REQUEST_PRINCIPAL: _request_principal,
    Attribute.AUDIENCES: _audience,
    Attribute.PRESENTER: _presenter,
    Attribute.CLAIMS: _claim,
    Attribute.HEADERS: _header,
}
_COST = {attribute: cost for cost, attribute in enumerate(_MAKERS)}
