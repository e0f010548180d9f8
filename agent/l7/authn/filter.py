"""The filter that checks tokens.

A request without a token passes: that one is there is AuthorizationPolicy's
to demand. With several rules one good token will do; else every token that is
there must be good for the rule that found it (Istio's `requires_any`).

A good token's payload becomes `CLAIMS` for policies. Headers that the rules
fill are emptied on every request, token or not, or a client could write them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Generator, Sequence
from typing import Any

from meshbpf.agent.l7.authn.keys import FetchedKeys, Keys, read_keys
from meshbpf.agent.l7.authn.places import find_tokens, remove_token
from meshbpf.agent.l7.authn.rules import JwtRule, KeyUri
from meshbpf.agent.l7.authn.uris import UriError, read_uri
from meshbpf.agent.l7.authn.verify import (
    NO_KEYS,
    UNKNOWN_ISSUER,
    Rejected,
    Token,
    check_claims,
    check_signature,
    claims_of,
)
from meshbpf.agent.l7.authz.facts import CLAIMS
from meshbpf.agent.l7.exchange import Exchange
from meshbpf.agent.l7.filter import (
    CONTINUE,
    Call,
    CallAnswer,
    CallFailed,
    Command,
    Filter,
    Outcome,
    Phase,
    Reply,
    Steps,
)
from meshbpf.agent.l7.message import Headers, RequestHead

REMEMBERED_TOKENS = 1024
"""Good tokens whose signature is not checked again; a client sends one many times."""


class KeyRing:
    """Keys by URI, and tokens that they were found good for; outlives changes of the objects."""

    def __init__(self) -> None:
        self._by_uri: dict[str, FetchedKeys] = {}
        self._good: dict[tuple[str, Keys], None] = {}

    def at(self, uri: str) -> FetchedKeys:
        """The keys of a URI."""
        return self._by_uri.setdefault(uri, FetchedKeys())

    def check(self, token: Token, keys: Keys) -> Rejected | None:
        """Whether one of `keys` signed the token, from memory where it was asked before."""
        # The set is part of the key: what a key that is gone has signed is asked anew.
        remembered = (token.text, keys)
        if remembered in self._good:
            return None
        rejected = check_signature(token, keys)
        if rejected is None:
            while len(self._good) >= REMEMBERED_TOKENS:
                del self._good[next(iter(self._good))]
            self._good[remembered] = None
        return rejected


class AuthenticationFilter(Filter):
    """All RequestAuthentications of one destination."""

    phase = Phase.JWT
    name = "RequestAuthentication"

    def __init__(self, rules: Sequence[JwtRule], ring: KeyRing) -> None:
        self._rules = tuple(rules)
        self._ring = ring
        self._written = frozenset(
            name
            for rule in rules
            for name in (rule.payload_header, *(header for header, _ in rule.claim_headers))
            if name
        )

    def on_request(self, exchange: Exchange) -> Outcome | Steps:
        """Check what tokens there are; a generator only where there are some."""
        request = exchange.request
        for name in self._written:
            request.headers.remove(name)
        if _is_preflight(request):
            return CONTINUE
        found = [(rule, token) for rule in self._rules for token in find_tokens(request, rule)]
        return self._check(exchange, found) if found else CONTINUE

    def _check(self, exchange: Exchange, found: Sequence[tuple[JwtRule, str]]) -> Steps:
        rejected: Rejected | None = None
        for rule, text in found:
            token = Token.read(text)
            if isinstance(token, Token):
                answer = yield from self._judge(exchange, rule, token)
                if answer is None:
                    self._accept(exchange, rule, token)
                    return CONTINUE
            else:
                answer = token
            # Another rule's token says nothing of what is wrong with it.
            if rejected is None or rejected is UNKNOWN_ISSUER:
                rejected = answer
        assert rejected is not None  # noqa: S101 - `found` is not empty
        return _unauthorized(exchange, rejected)

    def _judge(
        self, exchange: Exchange, rule: JwtRule, token: Token
    ) -> Generator[Command, Any, Rejected | None]:
        rejected = check_claims(token, rule, exchange.started_wall_s)
        if rejected is not None:
            return rejected
        uri = rule.uri
        if uri is None:
            return self._ring.check(token, rule.keys)
        now_s = exchange.started_s
        fetched = self._ring.at(uri.text)
        if fetched.due(now_s):
            yield from _fetch(fetched, uri, rule.timeout_s, now_s)
        rejected = self._with(fetched, token, now_s)
        if rejected is not None and rejected.unknown_key and fetched.due(now_s, missing=True):
            yield from _fetch(fetched, uri, rule.timeout_s, now_s)
            rejected = self._with(fetched, token, now_s)
        return rejected

    def _with(self, fetched: FetchedKeys, token: Token, now_s: float) -> Rejected | None:
        keys = fetched.usable(now_s)
        return self._ring.check(token, keys) if keys else NO_KEYS

    def _accept(self, exchange: Exchange, rule: JwtRule, token: Token) -> None:
        headers = exchange.request.headers
        claims = claims_of(token, rule)
        exchange.attributes[CLAIMS] = claims
        if not rule.forward:
            remove_token(exchange.request, rule, token.text)
        if rule.payload_header:
            headers.set(rule.payload_header, token.payload_text)
        for header, steps in rule.claim_headers:
            value = _claim_text(token.payload, steps)
            if value is not None:
                headers.set(header, value)


def _fetch(
    fetched: FetchedKeys, uri: KeyUri, timeout_s: float, now_s: float
) -> Generator[Command, Any, None]:
    fetched.asking(now_s)
    try:
        body = yield from _get(uri, timeout_s)
        if uri.discovery:
            try:
                named = json.loads(body)["jwks_uri"]
                target, path, tls = read_uri(named)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise _FetchError(
                    f"the discovery document has no usable jwks_uri: {error}"
                ) from None
            body = yield from _get(KeyUri(named, target, path, tls), timeout_s)
        fetched.take(read_keys(body), now_s)
    except (_FetchError, UriError, ValueError) as error:
        fetched.fail(str(error))


class _FetchError(Exception):
    """Why a fetch brought nothing."""


def _get(uri: KeyUri, timeout_s: float) -> Generator[Command, Any, bytes]:
    host = str(uri.target).removesuffix(":443" if uri.tls else ":80")
    head = RequestHead(
        "GET", uri.path, host, Headers([(b"accept", b"application/json")]), _scheme(uri)
    )
    call = Call(uri.target, head, timeout_s=timeout_s, tls=uri.tls, guarded=True)
    answer: CallAnswer | CallFailed = yield call
    if isinstance(answer, CallFailed):
        raise _FetchError(answer.reason)
    if answer.head.status != 200:
        # Redirects, too: they would lead round what the address was checked for.
        raise _FetchError(f"{uri.text} answered {answer.head.status}")
    return answer.body


def _scheme(uri: KeyUri) -> str:
    return "https" if uri.tls else "http"


def _is_preflight(request: RequestHead) -> bool:
    """A browser's CORS preflight never carries a token (Envoy's bypass_cors_preflight)."""
    return (
        request.method == "OPTIONS"
        and "origin" in request.headers
        and "access-control-request-method" in request.headers
    )


def _unauthorized(exchange: Exchange, rejected: Rejected) -> Reply:
    request = exchange.request
    where = f"{request.scheme}://{request.authority}{request.path_only}".replace('"', "")
    challenge = f'Bearer realm="{where}", error="invalid_token"'
    headers: tuple[tuple[str, str], ...] = (("content-type", "text/plain"),)
    if rejected.status == 401:
        headers = (("www-authenticate", challenge), *headers)
    reason = rejected.reason.replace(" ", "_")
    return Reply(
        rejected.status,
        rejected.reason.encode(),
        headers,
        f"jwt_authn_access_denied{{{reason}}}",
    )


def _claim_text(payload: Any, steps: tuple[str, ...]) -> str | None:
    """A claim as a header's value: texts and numbers as they are, the rest encoded (as Envoy)."""
    # A claim's name may hold dots itself: the whole name goes first.
    found = payload.get(".".join(steps))
    if found is None:
        found = payload
        for step in steps:
            found = found.get(step) if isinstance(found, dict) else None
    match found:
        case None:
            return None
        case str():
            return found if found.isprintable() else None
        case bool():
            return "true" if found else "false"
        case int() | float():
            return str(found)
    text = json.dumps(found, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(text).rstrip(b"=").decode()
