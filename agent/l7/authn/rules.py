"""RequestAuthentication (security.istio.io), parsed.

A rule says whose tokens are believed, where they are looked for, with what
keys they are checked, and what of them is passed on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from meshbpf.agent.core.authority import Authority
from meshbpf.agent.core.objects import KubeObject, ObjectKey
from meshbpf.agent.l7.attachment import TARGET_FIELDS, Target, read_targets
from meshbpf.agent.l7.authn.keys import Keys, read_keys
from meshbpf.agent.l7.authn.uris import UriError, read_uri
from meshbpf.agent.l7.durations import duration_s
from meshbpf.agent.l7.spec import Value

KIND = "RequestAuthentication"
GROUP = "security.istio.io"

FETCH_TIMEOUT_S = 5.0  # istio/api, JWTRule.timeout
_SPACED = ("scope", "permission")  # claims that Envoy's Istio configuration always splits
_HEADER_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_FIELDS = (
    "issuer",
    "audiences",
    "jwksUri",
    "jwks_uri",
    "jwks",
    "fromHeaders",
    "fromParams",
    "fromCookies",
    "outputPayloadToHeader",
    "outputClaimToHeaders",
    "forwardOriginalToken",
    "spaceDelimitedClaims",
    "timeout",
)


@dataclass(frozen=True, slots=True)
class HeaderPlace:
    """A token after `prefix` in a header; the name is in lower case."""

    name: str
    prefix: str = ""


# Where a rule that names no place looks (istio/api, JWTRule).
_BEARER = (HeaderPlace("authorization", "Bearer "),)
_ACCESS_TOKEN = ("access_token",)


@dataclass(frozen=True, slots=True)
class KeyUri:
    """Where keys are fetched. `discovery`: the answer names the URI of the keys."""

    text: str
    target: Authority
    path: str
    tls: bool
    discovery: bool = False


@dataclass(frozen=True, slots=True)
class JwtRule:
    """One issuer's tokens."""

    issuer: str
    audiences: frozenset[str] = frozenset()
    keys: Keys = ()
    """The keys written in the object; when there are any nothing is fetched."""
    uri: KeyUri | None = None
    headers: tuple[HeaderPlace, ...] = _BEARER
    params: tuple[str, ...] = _ACCESS_TOKEN
    cookies: tuple[str, ...] = ()
    payload_header: str = ""
    claim_headers: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(header, steps to the claim)."""
    forward: bool = False
    spaced_claims: frozenset[str] = frozenset(_SPACED)
    timeout_s: float = FETCH_TIMEOUT_S


@dataclass(frozen=True, slots=True)
class RequestAuthentication:
    """All rules of one object."""

    key: ObjectKey
    rules: tuple[JwtRule, ...]
    targets: tuple[Target, ...]


def parse_authentication(source: KubeObject) -> RequestAuthentication:
    """Read it; ObjectError names the field that makes it unusable."""
    fields = Value.spec(source).record((*TARGET_FIELDS, "jwtRules"))
    rules = tuple(map(_rule, fields["jwtRules"].items())) if "jwtRules" in fields else ()
    return RequestAuthentication(source.key, rules, read_targets(fields))


def _rule(value: Value) -> JwtRule:
    fields = value.record(_FIELDS)
    issuer = fields["issuer"].text(empty=True) if "issuer" in fields else ""
    written = fields.get("jwksUri") or fields.get("jwks_uri")
    uri: KeyUri | None = None
    keys: Keys = ()
    if "jwks" in fields:
        # What is written here is used, and nothing is fetched.
        try:
            keys = read_keys(fields["jwks"].text())
        except ValueError as error:
            raise fields["jwks"].error(str(error)) from None
    elif written is not None:
        uri = _uri(written, written.text())
    else:
        # As OpenID Connect Discovery 1.0, section 4, and Istio have it.
        named = value.need(fields, "issuer")
        uri = _uri(named, f"{issuer.rstrip('/')}/.well-known/openid-configuration", discovery=True)
    headers, params, cookies = _places(fields)
    if not (headers or params or cookies):
        headers, params = _BEARER, _ACCESS_TOKEN
    spaced = fields["spaceDelimitedClaims"].texts() if "spaceDelimitedClaims" in fields else ()
    payload = fields.get("outputPayloadToHeader")
    return JwtRule(
        issuer,
        frozenset(fields["audiences"].texts()) if "audiences" in fields else frozenset(),
        keys,
        uri,
        headers,
        params,
        cookies,
        "" if payload is None else _header(payload),
        _claim_headers(fields),
        "forwardOriginalToken" in fields and fields["forwardOriginalToken"].boolean(),
        frozenset((*_SPACED, *spaced)),
        duration_s(fields["timeout"]) if "timeout" in fields else FETCH_TIMEOUT_S,
    )


def _uri(field: Value, text: str, *, discovery: bool = False) -> KeyUri:
    try:
        target, path, tls = read_uri(text)
    except UriError as refused:
        raise field.error(f"{text!r} {refused}") from None
    return KeyUri(text, target, path, tls, discovery)


def _places(
    fields: Mapping[str, Value],
) -> tuple[tuple[HeaderPlace, ...], tuple[str, ...], tuple[str, ...]]:
    headers = []
    for item in fields["fromHeaders"].items() if "fromHeaders" in fields else ():
        body = item.record(("name", "prefix"))
        prefix = body["prefix"].text(empty=True) if "prefix" in body else ""
        headers.append(HeaderPlace(_header(item.need(body, "name")), prefix))
    params = fields["fromParams"].texts() if "fromParams" in fields else ()
    cookies = fields["fromCookies"].texts() if "fromCookies" in fields else ()
    return tuple(headers), params, cookies


def _claim_headers(fields: Mapping[str, Value]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    if "outputClaimToHeaders" not in fields:
        return ()
    found = []
    for item in fields["outputClaimToHeaders"].items():
        body = item.record(("header", "claim"))
        claim = item.need(body, "claim").text()
        found.append((_header(item.need(body, "header")), tuple(claim.split("."))))
    return tuple(found)


def _header(value: Value) -> str:
    name = value.text()
    if _HEADER_NAME.fullmatch(name) is None:
        raise value.error(f"{name!r} is not a header's name")
    return name.lower()
