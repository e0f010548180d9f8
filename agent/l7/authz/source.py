"""From the objects to the authorization filters of a destination.

A policy that goes bad stays in force as it was. One that never was good fails
closed where it says that it applies (parse.py); where its targetRefs cannot be
read it applies nowhere, and its Problem is all there is.
"""

from __future__ import annotations

from meshbpf.agent.l7.attachment import applies
from meshbpf.agent.l7.authz.custom import ExternalAuthorization
from meshbpf.agent.l7.authz.filter import AuthorizationFilter
from meshbpf.agent.l7.authz.parse import GROUP, KIND, closed_policy, parse_policy
from meshbpf.agent.l7.authz.policy import Action, HttpPolicy
from meshbpf.agent.l7.authz.trust import with_aliases
from meshbpf.agent.l7.filter import Filter
from meshbpf.agent.l7.memo import memo_of
from meshbpf.agent.l7.mesh_config import read_mesh_config
from meshbpf.agent.l7.problem import ObjectError, Problem
from meshbpf.agent.l7.providers import Authorizer
from meshbpf.agent.l7.sources import Scope


def authorization(scope: Scope) -> tuple[list[Filter], list[Problem]]:
    """The filters of all AuthorizationPolicies at a destination."""
    policies, problems = policies_at(scope)
    filters: list[Filter] = []
    if plain := [policy for policy in policies if policy.action is not Action.CUSTOM]:
        filters.append(AuthorizationFilter(plain))
    if custom := [policy for policy in policies if policy.action is Action.CUSTOM]:
        mesh, wrong = read_mesh_config(scope)
        problems += wrong
        for provider in dict.fromkeys(policy.provider for policy in custom):
            known = mesh.providers.get(provider)
            authorizer = known if isinstance(known, Authorizer) else None
            chosen = [policy for policy in custom if policy.provider == provider]
            filters.append(ExternalAuthorization(provider, authorizer, chosen))
            if authorizer is None:
                problems += [_unknown(scope, p) for p in chosen if not p.inexpressible]
    return filters, problems


def _unknown(scope: Scope, policy: HttpPolicy) -> Problem:
    source = scope.objects.by_key[policy.key]
    what = f"the mesh configuration has no ext_authz provider {policy.provider!r}"
    return ObjectError("spec.provider.name", what, reason="ProviderNotFound").problem(source)


def policies_at(scope: Scope) -> tuple[list[HttpPolicy], list[Problem]]:
    """The policies that hold at a destination, and what is wrong with any of the objects."""
    policies: list[HttpPolicy] = []
    problems: list[Problem] = []
    memo = memo_of(scope)
    for each in memo.every(GROUP, KIND):
        try:
            policy = memo.read(each, parse_policy)
        except ObjectError as error:
            problems.append(error.problem(each))
            policy = memo.last_good(each, parse_policy) or closed_policy(each, error)
        if applies(scope, policy.key, policy.targets):
            policies.append(policy)
    if policies:
        mesh, _ = read_mesh_config(scope)
        domains = (scope.trust_domain, *mesh.trust_domain_aliases)
        policies = [with_aliases(policy, domains) for policy in policies]
    # The order of evaluation must not depend on the order in which a cluster lists.
    policies.sort(key=lambda policy: (policy.key.namespace, policy.key.name))
    return policies, problems
