"""The filter for action CUSTOM: somebody else decides.

The rules of a CUSTOM policy say which requests its provider is asked about,
and which opaque TCP connections: of these only a gRPC provider can be asked
(Envoy's network filter ext_authz), an HTTP one refuses them. Every match is
refused where the provider is not configured. Both fail closed.
"""

from __future__ import annotations

from collections.abc import Sequence

from meshbpf.agent.l7.authz.check import (
    Allowed,
    Failed,
    check_call,
    connection_call,
    read_answer,
)
from meshbpf.agent.l7.authz.compiled import CompiledRule, compile_rules
from meshbpf.agent.l7.authz.facts import Facts
from meshbpf.agent.l7.authz.filter import REHEARSED
from meshbpf.agent.l7.authz.policy import HttpPolicy
from meshbpf.agent.l7.exchange import Connection, Exchange, Flag
from meshbpf.agent.l7.filter import (
    CONTINUE,
    Body,
    CallAnswer,
    CallFailed,
    Filter,
    Outcome,
    Phase,
    ReadBody,
    Reply,
    Steps,
)
from meshbpf.agent.l7.providers import Authorizer

_FOR_CLIENT = "ext_authz.for_client"
"""In `Exchange.attributes`: fields that authorizers add to the response."""
_FORBIDDEN = 403
_TOO_LARGE = 413
_TEXT = (("content-type", "text/plain"),)


class ExternalAuthorization(Filter):
    """All CUSTOM policies of one provider at one destination."""

    phase = Phase.CUSTOM

    def __init__(
        self, provider: str, authorizer: Authorizer | None, policies: Sequence[HttpPolicy]
    ) -> None:
        """`authorizer` None: the mesh configuration has no such provider."""
        self.name = f"ext_authz {provider}"
        self._provider = provider
        self._authorizer = authorizer
        enforced = [policy for policy in policies if not policy.dry_run]
        self._http = compile_rules(enforced, tcp=False)
        self._tcp = compile_rules(enforced, tcp=True)
        self._dry = compile_rules((p for p in policies if p.dry_run), tcp=False)

    def on_connect(self, connection: Connection) -> Outcome | Steps:
        """Ask about a connection, where a rule says so."""
        rule = _first(self._tcp, Facts(connection)) if self._tcp else None
        if rule is None:
            return CONTINUE
        authorizer = self._authorizer
        if authorizer is None or not authorizer.grpc or rule.policy.inexpressible:
            return Reply(_FORBIDDEN, detail=f"ext_authz_error_tcp[{rule.id}]")
        return self._ask_about(connection, authorizer, rule)

    def on_request(self, exchange: Exchange) -> Outcome | Steps:
        """Ask, where a rule says so."""
        facts = Facts.of(exchange)
        if self._dry and (rule := _first(self._dry, facts)):
            note = f"{rule.policy.name} would ask {self._provider}"
            exchange.attributes[REHEARSED] = (*exchange.attributes.get(REHEARSED, ()), note)
        rule = _first(self._http, facts)
        if rule is None:
            return CONTINUE
        if self._authorizer is None or rule.policy.inexpressible:
            return self._refuse(exchange, Reply(_FORBIDDEN, b"", _TEXT, "ext_authz_error"))
        return self._ask(exchange, self._authorizer)

    def on_response(self, exchange: Exchange) -> Outcome:
        """Add what an authorizer has for the client."""
        if exchange.response is not None:
            for name, value in exchange.attributes.pop(_FOR_CLIENT, ()):
                exchange.response.headers.set(name, value)
        return CONTINUE

    def explain(self, exchange: Exchange) -> str:
        """Whether the authorizer would be asked, and by which policy."""
        rule = _first(self._http, Facts.of(exchange))
        if rule is None:
            return "not asked"
        known = "would be asked" if self._authorizer else "is not configured: denied"
        return f"CUSTOM {rule.policy.name}, rule {rule.number}, matches: {self._provider} {known}"

    def _ask(self, exchange: Exchange, authorizer: Authorizer) -> Steps:
        body = b""
        if authorizer.body is not None:
            read: Body = yield ReadBody(authorizer.body.limit_bytes)
            if not read.complete and not authorizer.body.allow_partial:
                return Reply(_TOO_LARGE, b"Payload Too Large", _TEXT, "request_payload_too_large")
            body = read.data[: authorizer.body.limit_bytes]
        given: CallAnswer | CallFailed = yield check_call(authorizer, exchange, body)
        answer = (
            Failed(given.reason)
            if isinstance(given, CallFailed)
            else read_answer(authorizer, given)
        )
        match answer:
            case Allowed():
                _edit(exchange, answer)
                return CONTINUE
            case Failed() if authorizer.fail_open:
                exchange.detail = "ext_authz_error_allowed"
                return CONTINUE
            case Failed():
                reply = Reply(authorizer.status_on_error, b"", _TEXT, "ext_authz_error")
                return self._refuse(exchange, reply)
            case _:
                reply = Reply(answer.status, answer.body, answer.headers, "ext_authz_denied")
                return self._refuse(exchange, reply)

    def _ask_about(
        self, connection: Connection, authorizer: Authorizer, rule: CompiledRule
    ) -> Steps:
        given: CallAnswer | CallFailed = yield connection_call(authorizer, connection)
        answer = (
            Failed(given.reason)
            if isinstance(given, CallFailed)
            else read_answer(authorizer, given)
        )
        match answer:
            case Allowed():
                return CONTINUE
            case Failed() if authorizer.fail_open:
                return CONTINUE
            case Failed():
                return Reply(_FORBIDDEN, detail=f"ext_authz_error_tcp[{rule.id}]: {answer.reason}")
            case _:
                return Reply(_FORBIDDEN, detail=f"ext_authz_denied_tcp[{rule.id}]")

    def _refuse(self, exchange: Exchange, reply: Reply) -> Reply:
        exchange.flags.append(Flag.UNAUTHORIZED_EXTERNAL)
        return reply


def _edit(exchange: Exchange, answer: Allowed) -> None:
    headers = exchange.request.headers
    for name in answer.remove:
        headers.remove(name)
    for name, value in answer.set:
        headers.set(name, value)
    for name, value in answer.append:
        headers.add(name, value)
    if answer.for_client:
        before = exchange.attributes.get(_FOR_CLIENT, ())
        exchange.attributes[_FOR_CLIENT] = (*before, *answer.for_client)


def _first(rules: Sequence[CompiledRule], facts: Facts) -> CompiledRule | None:
    for rule in rules:
        if rule.holds(facts):
            return rule
    return None
