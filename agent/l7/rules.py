"""What a route says is to be done with a request: the parsed form of a rule.

The names are Gateway API's. Everything here is checked: no field needs a
second look when a request comes.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate
from typing import Generic, Protocol, TypeVar

from meshbpf.agent.core.workload import NamespacedHostname
from meshbpf.agent.l7.filter import Filter
from meshbpf.agent.l7.match import HttpMatch


@dataclass(frozen=True, slots=True)
class HeaderEdit:
    """RequestHeaderModifier, ResponseHeaderModifier; names in lower case."""

    set: tuple[tuple[str, str], ...] = ()
    add: tuple[tuple[str, str], ...] = ()
    remove: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PathEdit:
    """A new path: the whole of it, or (with `prefix`) what the match's prefix becomes."""

    value: str
    prefix: bool


@dataclass(frozen=True, slots=True)
class Redirect:
    """RequestRedirect: the fields that are None stay as the request has them."""

    status: int = 302
    scheme: str | None = None
    hostname: str | None = None
    path: PathEdit | None = None
    port: int | None = None


@dataclass(frozen=True, slots=True)
class Rewrite:
    """URLRewrite."""

    hostname: str | None = None
    path: PathEdit | None = None


@dataclass(frozen=True, slots=True)
class Cors:
    """CORS, as the Fetch standard and Gateway API have it. `*` stands for all."""

    origins: tuple[str, ...] = ()
    credentials: bool = False
    methods: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    expose: tuple[str, ...] = ()
    max_age_s: int = 5


@dataclass(frozen=True, slots=True)
class Filters:
    """The filters of a rule or of one of its backends."""

    request: HeaderEdit | None = None
    response: HeaderEdit | None = None
    redirect: Redirect | None = None
    rewrite: Rewrite | None = None
    mirrors: tuple[Mirror, ...] = ()
    cors: Cors | None = None
    extensions: tuple[Filter, ...] = ()
    """What ExtensionRefs name; asked once the rule was chosen."""


NO_FILTERS = Filters()


@dataclass(frozen=True, slots=True)
class Backend:
    """One backendRef. `invalid` says why it cannot be used: its share is answered 500."""

    service: NamespacedHostname
    port: int
    weight: int = 1
    filters: Filters = NO_FILTERS
    invalid: str = ""

    def __str__(self) -> str:
        return f"{self.service}:{self.port}"


@dataclass(frozen=True, slots=True)
class Mirror:
    """RequestMirror: a copy for `numerator` of `denominator` requests; its answer is dropped."""

    backend: Backend
    numerator: int = 100
    denominator: int = 100


@dataclass(frozen=True, slots=True)
class Retry:
    """Asking again for these statuses; connections that fail are tried again in any case."""

    codes: frozenset[int] = frozenset()
    attempts: int = 2
    """Retries, beyond the first try."""
    backoff_s: float = 0.025  # Envoy's base interval


class SessionKind(StrEnum):
    """What carries a session."""

    COOKIE = "Cookie"
    HEADER = "Header"


@dataclass(frozen=True, slots=True)
class Session:
    """SessionPersistence: who came with a session goes to the same endpoint."""

    name: str
    kind: SessionKind = SessionKind.COOKIE
    permanent: bool = False
    absolute_s: float = 0.0
    """0: none."""
    idle_s: float = 0.0


class Weighted(Protocol):
    """Has a share."""

    @property
    def weight(self) -> int:
        """Of the sum of all."""
        ...


B = TypeVar("B", bound=Weighted)


class Shares(Generic[B]):
    """Backends with their weights, ready to be drawn from."""

    __slots__ = ("_only", "_sums", "every")

    def __init__(self, every: Sequence[B]) -> None:
        self.every = tuple(every)
        self._sums = tuple(accumulate(each.weight for each in every))
        live = [each for each in every if each.weight]
        self._only = live[0] if len(live) == 1 else None

    def draw(self, rng: random.Random) -> B | None:
        """One of them; None when all weights are 0."""
        if self._only is not None:
            return self._only
        total = self._sums[-1] if self._sums else 0
        if not total:
            return None
        return self.every[bisect_right(self._sums, int(rng.random() * total))]


@dataclass(frozen=True, slots=True, eq=False)
class HttpRule:
    """One rule of an HTTPRoute or GRPCRoute."""

    name: str
    """`HTTPRoute shop/cart, rule 0`: for people, logs and telemetry."""
    backends: Shares[Backend]
    filters: Filters = NO_FILTERS
    timeout_s: float = 0.0
    """From the request's head to the response's end; 0: none."""
    try_timeout_s: float = 0.0
    """Of one try."""
    retry: Retry = field(default_factory=Retry)
    retry_asked: bool = False
    """The route names codes or attempts itself."""
    session: Session | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TcpRule:
    """The one rule of a TCPRoute or TLSRoute."""

    name: str
    backends: Shares[Backend]


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """A match with the rule that it leads to."""

    match: HttpMatch
    rule: HttpRule
    age: tuple[str, str, int]
    """Creation time, NAMESPACE/NAME, place in the route: what decides between equal matches."""
