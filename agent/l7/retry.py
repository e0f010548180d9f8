"""Whether a request that failed is asked again.

What has not been looked at by an endpoint may be sent to another whatever it
is; what broke unanswered only if its method is idempotent (RFC 9110, section
9.2.2): sent twice it does what it does once. Statuses are tried again only
where the route says so.

A budget keeps retries from becoming the load that breaks what is left: they
may be a fifth of the requests, and ten a second besides (GEP-3388).
"""

from __future__ import annotations

from enum import Enum

IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})
BUDGET_SHARE = 0.2
BUDGET_MIN_PER_S = 10.0
_SAVED_LIMIT = 100.0
_BACKOFF_LIMIT = 10  # times the base interval, as Envoy's


class Failure(Enum):
    """How one try ended without an answer."""

    UNSENT = "unsent"
    """No connection, or the endpoint says that it has not looked at it."""
    BROKEN = "broken"
    """It was sent, and nothing came back."""
    BAD_ANSWER = "bad answer"
    TIMEOUT = "timeout"


class RetryBudget:
    """How many retries one backend may still be given."""

    __slots__ = ("_at_s", "_tokens")

    def __init__(self, now_s: float) -> None:
        self._tokens = BUDGET_MIN_PER_S
        self._at_s = now_s

    def earned(self) -> None:
        """A request has begun."""
        self._tokens = min(self._tokens + BUDGET_SHARE, _SAVED_LIMIT)

    def take(self, now_s: float) -> bool:
        """Whether there may be one more retry now."""
        passed_s = max(now_s - self._at_s, 0.0)
        self._at_s = now_s
        self._tokens = min(self._tokens + passed_s * BUDGET_MIN_PER_S, _SAVED_LIMIT)
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


def may_repeat(failure: Failure, method: str) -> bool:
    """Whether sending it again is safe."""
    match failure:
        case Failure.UNSENT:
            return True
        case Failure.BROKEN | Failure.TIMEOUT:
            return method in IDEMPOTENT
        case Failure.BAD_ANSWER:
            return False


def backoff_s(base_s: float, retries: int, chance: float) -> float:
    """How long to wait before the next one: exponential with full jitter, as Envoy's."""
    ceiling = min(base_s * (2.0**retries), base_s * _BACKOFF_LIMIT)
    return ceiling * chance
