"""Whether a workload's policies let a connection in.

The meaning, as Istio's node proxies have it:

- a policy matches if any of its rules does (no rules: never);
- a rule matches if all its clauses do (no clauses: always);
- a clause matches if it is empty or any of its matches does;
- a match holds if all its fields do, and never when it has none;
- a field holds if any of its values does, a `not_` field if none does.

Then: dry-run policies are only reported; any DENY that matches denies; with
no ALLOW policy the connection is allowed; else an ALLOW must match. A policy
marked inexpressible fails closed.

`principals` compare with the identity less its scheme, and nothing matches a
caller without one; `namespaces` then see the empty text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from meshbpf.agent.core.address import IPAddress, address_bits
from meshbpf.agent.core.authz_index import RuleIndex
from meshbpf.agent.core.authz_match import Facts
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.policy import Authorization, PolicyAction


@dataclass(frozen=True, slots=True)
class ConnectionFacts:
    """All that a policy may read of a connection.

    `source_identity` is what mutual TLS proved, None for plaintext;
    `source_ip` is the TCP peer's; the destination is the final one, after
    the tunnel and after a service's port was resolved.
    """

    source_identity: SpiffeId | None
    source_ip: IPAddress
    destination_ip: IPAddress
    destination_port: int


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer; `policy` is the NAMESPACE/NAME that decided, if one did.

    `dry_run` has one line for each dry-run policy that would have mattered.
    """

    allowed: bool
    policy: str | None
    reason: str
    dry_run: tuple[str, ...] = ()


_NO_POLICY = Decision(True, None, "no policy applies")
_NO_ALLOW = Decision(True, None, "no policy denies, and none has to allow")
_NOT_ALLOWED = Decision(False, None, "no ALLOW policy matches")


class _Compiled(NamedTuple):
    """The indexes of some policies: what is enforced, then what is only reported."""

    deny: RuleIndex | None
    allow: RuleIndex | None
    dry_deny: RuleIndex | None
    dry_allow: RuleIndex | None


_KINDS = tuple(
    (action, dry) for dry in (False, True) for action in (PolicyAction.DENY, PolicyAction.ALLOW)
)


class PolicyGroup(tuple[Authorization, ...]):
    """Policies that come together, as a namespace's do; compiled when first asked.

    All sets that a group is part of share its indexes, and the group that
    succeeds it after a change of state is compiled from what it has already.
    """

    source: tuple[Authorization, ...]
    """What it was made of."""
    _compiled: _Compiled
    _before: _Compiled | None

    @classmethod
    def of(
        cls, policies: tuple[Authorization, ...], before: PolicyGroup | None = None
    ) -> PolicyGroup:
        """`before` is the same group as it was in an earlier state."""
        group = cls(policies)
        group.source = policies
        group._before = None if before is None else before._newest()
        return group

    def _newest(self) -> _Compiled | None:
        return getattr(self, "_compiled", None) or getattr(self, "_before", None)

    def compiled(self) -> _Compiled:
        """The indexes of this group."""
        try:
            return self._compiled
        except AttributeError:
            pass
        before = self._newest() or (None,) * len(_KINDS)
        made: list[RuleIndex | None] = []
        for (action, dry_run), old in zip(_KINDS, before, strict=True):
            chosen = [p for p in self if p.action is action and p.dry_run is dry_run]
            if not chosen:
                made.append(None)
            else:
                made.append(RuleIndex(chosen) if old is None else old.updated(chosen))
        self._compiled, self._before = _Compiled(*made), None
        return self._compiled


class PolicySet(tuple[Authorization, ...]):
    """The policies of one workload: a tuple of them for those who list them.

    The snapshot keeps one for each distinct set, so that what it derives is
    derived once.
    """

    _groups: tuple[PolicyGroup, ...]

    @classmethod
    def of_groups(cls, groups: Iterable[PolicyGroup]) -> PolicySet:
        """The policies of all `groups`; one that is in several counts once."""
        groups = tuple(group for group in groups if group)
        made = cls({policy.key: policy for group in groups for policy in group}.values())
        made._groups = groups
        return made

    def compile(self) -> Sequence[_Compiled]:
        """Its groups' indexes; whoever has time does this before a connection needs them."""
        try:
            groups = self._groups
        except AttributeError:
            groups = self._groups = (PolicyGroup.of(tuple(self)),)
        return [group.compiled() for group in groups]

    def decide(self, facts: ConnectionFacts) -> Decision:
        """Evaluate; of several policies that match the first by key is the one named."""
        if not self:
            return _NO_POLICY
        groups = self.compile()
        identity = facts.source_identity
        view = Facts(
            None if identity is None else identity.principal,
            "" if identity is None else identity.namespace,
            None if identity is None else identity.service_account,
            address_bits(facts.source_ip),
            address_bits(facts.destination_ip),
            facts.destination_port,
        )
        decision = _enforced(groups, view)
        if all(group.dry_deny is None and group.dry_allow is None for group in groups):
            return decision
        return replace(decision, dry_run=_rehearsed(groups, view))


def _first(indexes: Iterable[RuleIndex | None], view: Facts) -> Authorization | None:
    found = [policy for index in indexes if index and (policy := index.first(view))]
    return min(found, key=lambda policy: policy.key, default=None)


def _every(indexes: Iterable[RuleIndex | None], view: Facts) -> list[str]:
    return sorted({p.key for index in indexes if index for p in index.every(view)})


def _enforced(groups: Sequence[_Compiled], view: Facts) -> Decision:
    found = _first((group.deny for group in groups), view)
    if found is not None:
        if found.inexpressible:
            reason = f"DENY policy {found.key} cannot be evaluated: {found.inexpressible}"
        else:
            reason = f"DENY policy {found.key} matches"
        return Decision(False, found.key, reason)
    if all(group.allow is None for group in groups):
        return _NO_ALLOW
    found = _first((group.allow for group in groups), view)
    if found is None:
        return _NOT_ALLOWED
    return Decision(True, found.key, f"ALLOW policy {found.key} matches")


def _rehearsed(groups: Sequence[_Compiled], view: Facts) -> tuple[str, ...]:
    notes = [f"{key} would deny" for key in _every((g.dry_deny for g in groups), view)]
    if any(group.dry_allow for group in groups):
        allowed = [f"{key} would allow" for key in _every((g.dry_allow for g in groups), view)]
        if not allowed and all(group.allow is None for group in groups):
            allowed = ["no dry-run ALLOW policy matches: would deny"]
        notes += allowed
    return tuple(notes)


def authorize(policies: Iterable[Authorization], facts: ConnectionFacts) -> Decision:
    """Decide by `policies`; fast when they come from `Snapshot.policies_for`."""
    compiled = policies if isinstance(policies, PolicySet) else PolicySet(policies)
    return compiled.decide(facts)
