"""Keys that verify tokens, and the memory of those that were fetched.

A fetched set serves FRESH_S; after that it is fetched anew by the next token
that asks, and goes on serving, up to STALE_S, while the issuer does not
answer. A token signed by a key that is not there makes for an early fetch,
RETRY_S apart at most, since anyone may send such tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from jwt.algorithms import get_default_algorithms

FRESH_S = 20 * 60.0  # Istio's PILOT_JWT_PUB_KEY_REFRESH_INTERVAL
STALE_S = 24 * 3600.0
RETRY_S = 10.0
MAX_KEYS = 100

# By key and not by what a token asks for: a public RSA key must never serve
# as an HMAC secret.
_BY_KIND = {
    "RSA": frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}),
    "OKP": frozenset({"EdDSA"}),
    "oct": frozenset({"HS256", "HS384", "HS512"}),
}
ALGORITHMS = frozenset().union(*_BY_KIND.values(), ("ES256", "ES384", "ES512"))
_PRIVATE = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth"})
_ALGORITHMS = get_default_algorithms()
# What PyJWT lets out for members that are missing, of another type, or no point of the curve.
_UNUSABLE = (
    jwt.PyJWTError,
    UnsupportedAlgorithm,
    AttributeError,
    KeyError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, slots=True, eq=False)
class VerifyingKey:
    """One key, and what it may verify."""

    id: str | None
    algorithms: frozenset[str]
    key: Any

    def verifies(self, algorithm: str, signed: bytes, signature: bytes) -> bool:
        """Whether the signature over `signed` is this key's."""
        return bool(_ALGORITHMS[algorithm].verify(signed, self.key, signature))


Keys = tuple[VerifyingKey, ...]


def read_keys(text: str | bytes) -> Keys:
    """The keys of a JWKS document that verify tokens; ValueError when there are none.

    Keys of other kinds are left alone, as a set may hold more than these, and
    so are private halves.
    """
    try:
        entries = json.loads(text)["keys"]
    except (ValueError, KeyError, TypeError):
        entries = None
    if not isinstance(entries, list):
        raise ValueError("is not a JSON web key set")
    found = (_key(entry) for entry in entries[:MAX_KEYS] if isinstance(entry, dict))
    keys = tuple(key for key in found if key is not None)
    if not keys:
        raise ValueError("has no signing key of a known kind")
    return keys


def _key(entry: Mapping[str, Any]) -> VerifyingKey | None:
    if entry.get("use", "sig") != "sig":
        return None
    try:
        made = jwt.PyJWK({name: value for name, value in entry.items() if name not in _PRIVATE})
    except _UNUSABLE:
        return None
    able = _BY_KIND.get(str(entry.get("kty")), frozenset({made.algorithm_name}))
    if "alg" in entry:
        able &= {entry["alg"]}
    kid = entry.get("kid")
    return VerifyingKey(kid if isinstance(kid, str) else None, able & ALGORITHMS, made.key)


@dataclass(slots=True)
class FetchedKeys:
    """The keys of one URI; outlives changes of the objects. Times are of one monotonic clock."""

    keys: Keys = ()
    fetched_s: float = float("-inf")
    asked_s: float = float("-inf")
    failure: str = ""
    """Why the last fetch brought nothing; empty after a good one."""

    def due(self, now_s: float, *, missing: bool = False) -> bool:
        """Whether to fetch now; `missing`: a token needs a key that is not there."""
        if now_s - self.asked_s < RETRY_S:
            return False
        return missing or now_s - self.fetched_s >= FRESH_S

    def usable(self, now_s: float) -> Keys:
        """What may verify now."""
        return self.keys if now_s - self.fetched_s < STALE_S else ()

    def asking(self, now_s: float) -> None:
        """A fetch begins: others need not start one."""
        self.asked_s = now_s

    def take(self, keys: Keys, now_s: float) -> None:
        """It succeeded."""
        self.keys, self.fetched_s, self.failure = keys, now_s, ""

    def fail(self, reason: str) -> None:
        """It failed; what there was goes on."""
        self.failure = reason
