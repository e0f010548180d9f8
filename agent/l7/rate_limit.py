"""A local rate limit: so many requests in a time, counted by each waypoint process alone.

    apiVersion: meshbpf.io/v1alpha1
    kind: RateLimit
    metadata: {name: gentle, namespace: shop}
    spec:
      requests: 100
      per: Second          # Second, Minute, Hour
      burst: 20            # on top of the steady rate; default: requests
      by: Caller           # Caller (proven identity, else address), or All
      targetRefs:          # or named by an HTTPRoute's ExtensionRef filter
      - {group: "", kind: Service, name: cart}

Istio's waypoints need an EnvoyFilter for this, which they refuse. With several
workers or replicas each counts for itself: set `requests` accordingly.

A token bucket: refused requests are answered 429 with `retry-after`. A
RateLimit that cannot be read limits nothing and is reported; it is a
safeguard, no access control.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from meshbpf.agent.core.objects import KubeObject
from meshbpf.agent.l7.exchange import Exchange, Flag
from meshbpf.agent.l7.filter import CONTINUE, Filter, Outcome, Phase, Reply
from meshbpf.agent.l7.problem import ObjectError, Problem
from meshbpf.agent.l7.sources import Scope
from meshbpf.agent.l7.spec import Value

GROUP = "meshbpf.io"
KIND = "RateLimit"
_SECONDS = {"Second": 1.0, "Minute": 60.0, "Hour": 3600.0}
_CALLERS_LIMIT = 4096
"""Buckets kept; the one that was used longest ago makes room, and then begins full."""


@dataclass(frozen=True, slots=True)
class Limit:
    """How much is allowed."""

    rate_per_s: float
    burst: int
    by_caller: bool


class Bucket:
    """Tokens that come back with time."""

    __slots__ = ("_at_s", "_tokens")

    def __init__(self, limit: Limit, now_s: float) -> None:
        self._tokens = float(limit.burst)
        self._at_s = now_s

    def take(self, limit: Limit, now_s: float) -> float:
        """Take one token; 0, or how many seconds it would take for one to be there."""
        filled = self._tokens + max(now_s - self._at_s, 0.0) * limit.rate_per_s
        self._tokens = min(filled, float(limit.burst))
        self._at_s = now_s
        if self._tokens >= 1.0:
            self._tokens -= 1.0
            return 0.0
        return (1.0 - self._tokens) / limit.rate_per_s


class RateLimitFilter(Filter):
    """One RateLimit."""

    phase = Phase.BUILT_IN

    def __init__(self, name: str, limit: Limit, buckets: OrderedDict[str, Bucket]) -> None:
        self.name = name
        self.limit = limit
        self._buckets = buckets

    def on_request(self, exchange: Exchange) -> Outcome:
        """Count the request; refuse it when there is no token."""
        key = ""
        if self.limit.by_caller:
            caller = exchange.caller
            key = caller.identity.principal if caller.identity else str(caller.address.ip)
        wait_s = self._bucket(key, exchange.started_s).take(self.limit, exchange.started_s)
        if not wait_s:
            return CONTINUE
        exchange.flags.append(Flag.RATE_LIMITED)
        headers = (("retry-after", str(max(math.ceil(wait_s), 1))),)
        return Reply(429, b"local rate limit\n", headers, detail="local_rate_limited")

    def explain(self, exchange: Exchange) -> str:
        """The limit, in words."""
        by = " for each caller" if self.limit.by_caller else ""
        return f"{self.limit.rate_per_s:g} requests/s, burst {self.limit.burst}{by}"

    def _bucket(self, key: str, now_s: float) -> Bucket:
        buckets = self._buckets
        bucket = buckets.get(key)
        if bucket is None:
            if len(buckets) >= _CALLERS_LIMIT:
                buckets.popitem(last=False)
            bucket = buckets[key] = Bucket(self.limit, now_s)
        else:
            buckets.move_to_end(key)
        return bucket


def read_rate_limit(
    about: KubeObject, keep: dict[tuple[str, ...], Any], place: str = ""
) -> RateLimitFilter:
    """Parse one RateLimit; its buckets outlive changes of objects. Raises ObjectError.

    `place` tells destinations apart that share the object: each has its own buckets.
    """
    spec = Value.spec(about)
    fields = spec.record(("requests", "per", "burst", "by", "targetRefs"))
    requests = spec.need(fields, "requests").integer(1, 10**9)
    per, burst, by = fields.get("per"), fields.get("burst"), fields.get("by")
    seconds = 1.0 if per is None else per.choice(_SECONDS)
    limit = Limit(
        rate_per_s=requests / seconds,
        burst=requests if burst is None else burst.integer(1, 10**9),
        by_caller=by is not None and by.choice({"Caller": True, "All": False}),
    )
    name = f"{about.namespace}/{about.name}"
    buckets = keep.setdefault(("rate-limit", name, place, repr(limit)), OrderedDict())
    return RateLimitFilter(name, limit, buckets)


def rate_limits(scope: Scope) -> tuple[list[Filter], list[Problem]]:
    """The RateLimits whose targetRefs name this destination: a FilterSource."""
    found: list[Filter] = []
    problems: list[Problem] = []
    place = "" if scope.service is None else str(scope.service.key)
    for each in scope.objects.of_kind(GROUP, KIND):
        refs = each.spec.get("targetRefs") or ()
        if not any(scope.targets(ref, each.namespace) for ref in refs):
            continue
        try:
            found.append(read_rate_limit(each, scope.keep, place))
        except ObjectError as error:
            problems.append(error.problem(each))
    return found, problems
