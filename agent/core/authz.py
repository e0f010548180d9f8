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

from collections.abc import Iterable
from dataclasses import dataclass, replace

from meshbpf.agent.core.address import IPAddress, address_bits
from meshbpf.agent.core.authz_index import Facts, RuleIndex
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


class PolicySet(tuple[Authorization, ...]):
    """The policies of one workload, compiled when first asked.

    A tuple of the policies themselves for those who list them. The snapshot
    keeps one for each distinct set, so the work is done once per set.
    """

    _deny: RuleIndex | None
    _allow: RuleIndex | None
    _dry_deny: RuleIndex | None
    _dry_allow: RuleIndex | None

    def _compile(self) -> None:
        def index(action: PolicyAction, dry_run: bool) -> RuleIndex | None:
            chosen = [p for p in self if p.action is action and p.dry_run is dry_run]
            return RuleIndex(chosen) if chosen else None

        self._allow = index(PolicyAction.ALLOW, False)
        self._dry_allow = index(PolicyAction.ALLOW, True)
        self._dry_deny = index(PolicyAction.DENY, True)
        # Last: its presence says that the others are there.
        self._deny = index(PolicyAction.DENY, False)

    def decide(self, facts: ConnectionFacts) -> Decision:
        """Evaluate; the first policy in order that matches is the one named."""
        if not self:
            return _NO_POLICY
        try:
            deny = self._deny
        except AttributeError:
            self._compile()
            deny = self._deny
        identity = facts.source_identity
        view = Facts(
            None if identity is None else identity.principal,
            "" if identity is None else identity.namespace,
            None if identity is None else identity.service_account,
            address_bits(facts.source_ip),
            address_bits(facts.destination_ip),
            facts.destination_port,
        )
        decision = self._enforced(deny, view)
        if self._dry_deny is None and self._dry_allow is None:
            return decision
        return replace(decision, dry_run=self._rehearsed(view))

    def _enforced(self, deny: RuleIndex | None, view: Facts) -> Decision:
        found = None if deny is None else deny.first(view)
        if found is not None:
            if found.inexpressible:
                reason = f"DENY policy {found.key} cannot be evaluated: {found.inexpressible}"
            else:
                reason = f"DENY policy {found.key} matches"
            return Decision(False, found.key, reason)
        if self._allow is None:
            return _NO_ALLOW
        found = self._allow.first(view)
        if found is None:
            return _NOT_ALLOWED
        return Decision(True, found.key, f"ALLOW policy {found.key} matches")

    def _rehearsed(self, view: Facts) -> tuple[str, ...]:
        notes: list[str] = []
        if self._dry_deny is not None:
            notes += [f"{p.key} would deny" for p in self._dry_deny.every(view)]
        if self._dry_allow is not None:
            allowed = [f"{p.key} would allow" for p in self._dry_allow.every(view)]
            if not allowed and self._allow is None:
                allowed = ["no dry-run ALLOW policy matches: would deny"]
            notes += allowed
        return tuple(notes)


def authorize(policies: Iterable[Authorization], facts: ConnectionFacts) -> Decision:
    """Decide by `policies`; fast when they come from `Snapshot.policies_for`."""
    compiled = policies if isinstance(policies, PolicySet) else PolicySet(policies)
    return compiled.decide(facts)
