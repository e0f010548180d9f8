"""The filter that enforces ALLOW, DENY and AUDIT."""

from __future__ import annotations

from collections.abc import Sequence

from meshbpf.agent.l7.authz.decision import Decider, Verdict
from meshbpf.agent.l7.authz.facts import Facts
from meshbpf.agent.l7.authz.policy import HttpPolicy
from meshbpf.agent.l7.exchange import Connection, Exchange
from meshbpf.agent.l7.filter import CONTINUE, Filter, Outcome, Phase, Reply

AUDITED = "authz.audited"
"""In `Exchange.attributes`: NAMESPACE/NAME of the AUDIT policies that matched."""
REHEARSED = "authz.dry_run"
"""In `Exchange.attributes`: what dry-run policies would have done, a line each."""

_BODY = b"RBAC: access denied"  # Envoy's
_FORBIDDEN = 403


class AuthorizationFilter(Filter):
    """All policies of one destination; made once when they change."""

    phase = Phase.AUTHORIZATION
    name = "AuthorizationPolicy"

    def __init__(self, policies: Sequence[HttpPolicy]) -> None:
        self.policies = tuple(policies)
        self._http = Decider(policies, tcp=False)
        self._tcp = Decider(policies, tcp=True)

    def on_connect(self, connection: Connection) -> Outcome:
        """Refuse a connection that the policies do not let in."""
        verdict = self._tcp.decide(Facts(connection))
        return CONTINUE if verdict.allowed else _refusal(verdict)

    def on_request(self, exchange: Exchange) -> Outcome:
        """Answer 403 where the policies do not let the request in."""
        verdict = self._http.decide(Facts.of(exchange))
        if verdict.audits:
            exchange.attributes[AUDITED] = verdict.audits
        if verdict.rehearsed:
            exchange.attributes[REHEARSED] = verdict.rehearsed
        return CONTINUE if verdict.allowed else _refusal(verdict)

    def explain(self, exchange: Exchange) -> str:
        """The verdict in words."""
        verdict = self._http.decide(Facts.of(exchange))
        word = "allowed" if verdict.allowed else "denied"
        notes = (f"{word}: {verdict.reason}", *verdict.rehearsed)
        return "; ".join((*notes, *(f"{name} audits" for name in verdict.audits)))


def _refusal(verdict: Verdict) -> Reply:
    return Reply(_FORBIDDEN, _BODY, (("content-type", "text/plain"),), verdict.detail)
