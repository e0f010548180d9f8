"""Finding tokens in a request, and taking them out again."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import unquote_plus

from meshbpf.agent.l7.authn.rules import JwtRule
from meshbpf.agent.l7.message import RequestHead


def find_tokens(request: RequestHead, rule: JwtRule) -> Iterator[str]:
    """All tokens at the rule's places, in the order in which they are tried."""
    for place in rule.headers:
        for value in request.headers.every(place.name):
            if value.startswith(place.prefix):
                # The token ends where no token's character follows, as Envoy reads it.
                token = value[len(place.prefix) :].strip().partition(" ")[0].partition(",")[0]
                if token:
                    yield token
    for name in rule.params:
        for key, value in _pairs(request.query):
            if key == name and value:
                yield value
    for name in rule.cookies:
        for key, value in _cookies(request):
            if key == name and value:
                yield value


def remove_token(request: RequestHead, rule: JwtRule, token: str) -> None:
    """Take the verified token out of every place of the rule, so that no backend can reuse it."""
    for place in rule.headers:
        values = request.headers.every(place.name)
        kept = [value for value in values if token not in value]
        if len(kept) != len(values):
            request.headers.remove(place.name)
            for value in kept:
                request.headers.add(place.name, value)
    if rule.params and request.query:
        parts = request.query.split("&")
        left = [
            part
            for part in parts
            if not any(key in rule.params and value == token for key, value in _pairs(part))
        ]
        if len(left) != len(parts):
            query = "&".join(left)
            request.path = request.path_only + (f"?{query}" if query else "")
    if rule.cookies:
        pairs = list(_cookies(request))
        stay = [pair for pair in pairs if not (pair[0] in rule.cookies and pair[1] == token)]
        if len(stay) != len(pairs):
            request.headers.remove("cookie")
            if stay:
                request.headers.add("cookie", "; ".join(f"{key}={value}" for key, value in stay))


def _pairs(query: str) -> Iterator[tuple[str, str]]:
    for part in query.split("&"):
        key, _, value = part.partition("=")
        yield unquote_plus(key), unquote_plus(value)


def _cookies(request: RequestHead) -> Iterator[tuple[str, str]]:
    # HTTP/2 may spread cookies over several fields (RFC 9113, section 8.2.3).
    for field in request.headers.every("cookie"):
        for part in field.split(";"):
            key, equals, value = part.strip().partition("=")
            if equals:
                yield key, value.strip('"')
