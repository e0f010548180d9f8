"""Whether the policies of a destination let a request or a connection in.

Istio's order: CUSTOM first (its own filter, for it must ask outside), then
any DENY that matches denies; with no ALLOW policy the request passes; else an
ALLOW must match. AUDIT only marks. Dry-run policies are evaluated beside them
and only reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from meshbpf.agent.l7.authz.compiled import CompiledRule, compile_rules
from meshbpf.agent.l7.authz.facts import Facts
from meshbpf.agent.l7.authz.policy import Action, HttpPolicy


class Verdict(NamedTuple):
    """The answer, and the rule that gave it if one did."""

    allowed: bool
    rule: CompiledRule | None
    reason: str
    audits: tuple[str, ...] = ()
    """NAMESPACE/NAME of the AUDIT policies that match."""
    rehearsed: tuple[str, ...] = ()
    """What dry-run policies would have done."""

    @property
    def detail(self) -> str:
        """Envoy's response code detail of a denial."""
        name = "none" if self.rule is None else self.rule.id
        return f"rbac_access_denied_matched_policy[{name}]"


_PASSED = Verdict(True, None, "no policy denies, and none has to allow")
_NOT_ALLOWED = Verdict(False, None, "no ALLOW policy matches")


class Decider:
    """The policies that hold at one destination, compiled for one protocol."""

    __slots__ = ("_allow", "_audit", "_deny", "_dry_allow", "_dry_deny", "_must_allow", "_plain")

    def __init__(self, policies: Sequence[HttpPolicy], *, tcp: bool) -> None:
        def rules(action: Action, *, dry_run: bool) -> tuple[CompiledRule, ...]:
            chosen = [p for p in policies if p.action is action and p.dry_run is dry_run]
            return compile_rules(chosen, tcp=tcp)

        self._deny = rules(Action.DENY, dry_run=False)
        self._allow = rules(Action.ALLOW, dry_run=False)
        self._audit = rules(Action.AUDIT, dry_run=False)
        self._dry_deny = rules(Action.DENY, dry_run=True)
        self._dry_allow = rules(Action.ALLOW, dry_run=True)
        # An ALLOW policy counts even when no rule of it can ever match.
        self._must_allow = any(p.action is Action.ALLOW and not p.dry_run for p in policies)
        self._plain = not (self._audit or any(p.dry_run for p in policies))

    def decide(self, facts: Facts) -> Verdict:
        """Evaluate; the first rule in order that matches is the one named."""
        verdict = self._enforced(facts)
        if self._plain:
            return verdict
        audits = [rule.policy.name for rule in self._audit if rule.holds(facts)]
        return verdict._replace(
            audits=tuple(dict.fromkeys(audits)), rehearsed=self._rehearsed(facts)
        )

    def _enforced(self, facts: Facts) -> Verdict:
        for rule in self._deny:
            if rule.holds(facts):
                policy = rule.policy
                if policy.inexpressible:
                    return Verdict(
                        False, rule, f"DENY {policy.name} is bad: {policy.inexpressible}"
                    )
                return Verdict(False, rule, f"DENY {policy.name}, rule {rule.number}, matches")
        if not self._must_allow:
            return _PASSED
        for rule in self._allow:
            if rule.holds(facts):
                return Verdict(True, rule, f"ALLOW {rule.policy.name}, rule {rule.number}, matches")
        return _NOT_ALLOWED

    def _rehearsed(self, facts: Facts) -> tuple[str, ...]:
        deny = [f"{r.policy.name} would deny" for r in self._dry_deny if r.holds(facts)]
        allow = [f"{r.policy.name} would allow" for r in self._dry_allow if r.holds(facts)]
        return tuple(dict.fromkeys((*deny, *allow)))
