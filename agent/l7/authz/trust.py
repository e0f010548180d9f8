"""Principals in policies, when the mesh's trust domain is not what they were written for.

Examples and charts say `cluster.local/ns/..`; a mesh may have another trust
domain, or have had one. Istio lets `cluster.local`, the mesh's own domain and
its aliases stand for each other in `principals` and `trustDomains`
(pilot/pkg/security/trustdomain/bundle.go), and so do we.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from meshbpf.agent.core.identity import DEFAULT_TRUST_DOMAIN
from meshbpf.agent.core.policy import MatchKind, StringMatch
from meshbpf.agent.l7.authz.patterns import Glob
from meshbpf.agent.l7.authz.policy import Attribute, Condition, HttpPolicy, HttpRule, Pattern


def with_aliases(policy: HttpPolicy, domains: Sequence[str]) -> HttpPolicy:
    """The policy with each of the mesh's domains where one of them was written.

    `domains` are the mesh's own and its aliases.
    """
    known = (*dict.fromkeys((*domains, DEFAULT_TRUST_DOMAIN)),)
    if known == (DEFAULT_TRUST_DOMAIN,):
        return policy
    # cluster.local stands for the others, but is none of the mesh's itself
    # unless the mesh says so.
    stands = tuple(dict.fromkeys(domains))
    return replace(policy, rules=tuple(_rule(rule, known, stands) for rule in policy.rules))


def _rule(rule: HttpRule, known: Sequence[str], stands: Sequence[str]) -> HttpRule:
    def each(tests: Sequence[Condition]) -> tuple[Condition, ...]:
        return tuple(
            replace(
                test,
                values=_expanded(test.values, known, stands),
                not_values=_expanded(test.not_values, known, stands),
            )
            if test.attribute in (Attribute.PRINCIPAL, Attribute.TRUST_DOMAIN)
            else test
            for test in tests
        )

    return HttpRule(tuple(map(each, rule.sources)), rule.operations, each(rule.conditions))


def _expanded(
    patterns: Sequence[Pattern], known: Sequence[str], stands: Sequence[str]
) -> tuple[Pattern, ...]:
    found: dict[Pattern, None] = {}
    for pattern in patterns:
        found.setdefault(pattern)
        match pattern:
            case StringMatch(MatchKind.EXACT | MatchKind.PREFIX, value):
                domain, slash, rest = value.partition("/")
                if slash and domain in known:
                    for other in stands:
                        found.setdefault(StringMatch(pattern.kind, f"{other}/{rest}"))
            case Glob(text) if text in known:
                for other in stands:
                    found.setdefault(Glob(other))
    return tuple(found)
