"""Whether a token is what it says, by Envoy's rules and with its words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jwt.utils import base64url_decode

from meshbpf.agent.l7.authn.keys import ALGORITHMS, Keys
from meshbpf.agent.l7.authn.rules import JwtRule

CLOCK_SKEW_S = 60.0  # Envoy's JwtProvider.clock_skew_seconds
MAX_TOKEN_CHARS = 16 * 1024


@dataclass(frozen=True, slots=True)
class Rejected:
    """Why a token is not believed, in Envoy's words (jwt_verify_lib, status.cc)."""

    reason: str
    status: int = 401
    unknown_key: bool = False
    """Newer keys might know it."""


BAD_FORM = Rejected(
    "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections"
)
BAD_HEADER = Rejected("Jwt header is an invalid JSON")
BAD_ALGORITHM = Rejected("Jwt header [alg] field is not supported")
BAD_PAYLOAD = Rejected("Jwt payload is an invalid JSON")
BAD_SIGNATURE = Rejected("Jwt signature is an invalid Base64url encoded")
UNKNOWN_ISSUER = Rejected("Jwt issuer is not configured")
EXPIRED = Rejected("Jwt is expired")
NOT_YET = Rejected("Jwt not yet valid")
WRONG_AUDIENCE = Rejected("Audiences in Jwt are not allowed", 403)
NO_KEYS = Rejected("Jwks remote fetch is failed")
NO_KEY = Rejected("Jwks doesn't have key to match kid or alg from Jwt", unknown_key=True)
WRONG_SIGNATURE = Rejected("Jwt verification fails", unknown_key=True)


@dataclass(frozen=True, slots=True)
class Token:
    """A token taken apart, nothing of it believed yet."""

    text: str
    header: Mapping[str, Any]
    payload: Mapping[str, Any]
    payload_text: str
    """As it stands between the dots."""

    @classmethod
    def read(cls, text: str) -> Token | Rejected:
        """Take it apart."""
        parts = text.split(".")
        if len(parts) != 3 or len(text) > MAX_TOKEN_CHARS or not text.isascii():
            return BAD_FORM
        header = _json(parts[0])
        if header is None:
            return BAD_HEADER
        if header.get("alg") not in ALGORITHMS or "crit" in header:
            return BAD_ALGORITHM
        payload = _json(parts[1])
        if payload is None:
            return BAD_PAYLOAD
        return cls(text, header, payload, parts[1])


def check_claims(token: Token, rule: JwtRule, now_s: float) -> Rejected | None:
    """Issuer, times and audience, which cost nothing, before the signature, which does."""
    payload = token.payload
    if rule.issuer and payload.get("iss") != rule.issuer:
        return UNKNOWN_ISSUER
    if (expiry := payload.get("exp")) is not None:
        if not _number(expiry):
            return BAD_PAYLOAD
        if not now_s <= expiry + CLOCK_SKEW_S:  # so that NaN has expired, too
            return EXPIRED
    if (start := payload.get("nbf")) is not None:
        if not _number(start):
            return BAD_PAYLOAD
        if not now_s >= start - CLOCK_SKEW_S:
            return NOT_YET
    if rule.audiences:
        given = payload.get("aud", ())
        audiences = [given] if isinstance(given, str) else given
        if not isinstance(audiences, list) or not any(
            isinstance(each, str) and _trim(each) in map(_trim, rule.audiences)
            for each in audiences
        ):
            return WRONG_AUDIENCE
    return None


def check_signature(token: Token, keys: Keys) -> Rejected | None:
    """Whether one of `keys` signed it."""
    algorithm, kid = token.header["alg"], token.header.get("kid")
    fitting = [
        key
        for key in keys
        if algorithm in key.algorithms and (kid is None or key.id is None or key.id == kid)
    ]
    if not fitting:
        return NO_KEY
    signed, _, encoded = token.text.rpartition(".")
    try:
        signature = base64url_decode(encoded)
    except ValueError:
        return BAD_SIGNATURE
    if any(key.verifies(algorithm, signed.encode(), signature) for key in fitting):
        return None
    return WRONG_SIGNATURE


def claims_of(token: Token, rule: JwtRule) -> dict[str, Any]:
    """The payload as policies read it: claims of several words become lists."""
    claims = dict(token.payload)
    for name in rule.spaced_claims:
        if isinstance(text := claims.get(name), str):
            claims[name] = text.split(" ")
    return claims


def _trim(audience: str) -> str:
    """Envoy compares audiences without scheme and trailing slash (check_audience.cc)."""
    for scheme in ("http://", "https://"):
        audience = audience.removeprefix(scheme)
    return audience.removesuffix("/")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _json(part: str) -> dict[str, Any] | None:
    try:
        found = json.loads(base64url_decode(part))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
