"""From the objects to the authentication filter of a destination.

A RequestAuthentication that goes bad stays in force as it was. One that never
was good is left out whole: no token of its issuers is believed, so a policy
that demands a request principal refuses, and fails closed.
"""

from __future__ import annotations

from meshbpf.agent.l7.attachment import applies
from meshbpf.agent.l7.authn.filter import AuthenticationFilter, KeyRing
from meshbpf.agent.l7.authn.rules import GROUP, KIND, JwtRule, parse_authentication
from meshbpf.agent.l7.filter import Filter
from meshbpf.agent.l7.memo import memo_of
from meshbpf.agent.l7.problem import ObjectError, Problem
from meshbpf.agent.l7.sources import Scope

_RING = ("authn", "ring")


def authentication(scope: Scope) -> tuple[list[Filter], list[Problem]]:
    """One filter for all RequestAuthentications at a destination."""
    rules: list[JwtRule] = []
    problems: list[Problem] = []
    memo = memo_of(scope)
    for each in memo.every(GROUP, KIND):
        try:
            read = memo.read(each, parse_authentication)
        except ObjectError as error:
            problems.append(error.problem(each))
            good = memo.last_good(each, parse_authentication)
            if good is None:
                continue
            read = good
        if applies(scope, read.key, read.targets):
            rules += read.rules
    if not rules:
        return [], problems
    ring: KeyRing = scope.keep.setdefault(_RING, KeyRing())
    return [AuthenticationFilter(rules, ring)], problems
