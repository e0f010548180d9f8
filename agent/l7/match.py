"""Which requests a rule is for, and which of several rules comes first.

The order of Gateway API (HTTPRouteRule.matches): an exact path, then the
longest prefix, then a regular expression; then a method; then more headers;
then more query parameters. GRPCRoute's matches are paths of the form
`/service/method` and fall into the same order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from urllib.parse import parse_qsl

from meshbpf.agent.l7.message import RequestHead
from meshbpf.agent.l7.regex import Regex

_MAX_QUERY_FIELDS = 256
"""More are not looked at: a request may not make us parse for ever."""


class RequestView:
    """What matches read of a request, each part made once."""

    __slots__ = ("_query", "head", "path")

    def __init__(self, head: RequestHead) -> None:
        self.head = head
        self.path = head.path_only
        self._query: dict[str, str] | None = None

    @property
    def query(self) -> dict[str, str]:
        """The first value of each parameter: Gateway API leaves repeated ones open."""
        if self._query is None:
            try:
                pairs = parse_qsl(
                    self.head.query, keep_blank_values=True, max_num_fields=_MAX_QUERY_FIELDS
                )
            except ValueError:
                pairs = []
            self._query = {}
            for name, value in pairs:
                self._query.setdefault(name, value)
        return self._query


class PathKind(IntEnum):
    """In the order of precedence."""

    EXACT = 0
    PREFIX = 1
    REGEX = 2


@dataclass(frozen=True, slots=True)
class PathMatch:
    """One condition on the path, without the query.

    A prefix counts in whole segments: `/a` fits `/a` and `/a/b`, not `/ab`.
    """

    kind: PathKind
    value: str
    regex: Regex | None = None

    def matches(self, path: str) -> bool:
        """Whether it holds."""
        value = self.value
        match self.kind:
            case PathKind.EXACT:
                return path == value
            case PathKind.PREFIX:
                # `value` has no slash at its end: "" stands for "/".
                return path.startswith(value) and (
                    len(path) == len(value) or path[len(value)] == "/"
                )
            case PathKind.REGEX:
                return self.regex is not None and self.regex.fits(path)

    def __str__(self) -> str:
        shown = self.value or "/"
        return {0: f"path = {shown}", 1: f"path {shown}...", 2: f"path ~ {shown}"}[self.kind]


ANY_PATH = PathMatch(PathKind.PREFIX, "")


@dataclass(frozen=True, slots=True)
class FieldMatch:
    """One condition on a header (lower-case name) or query parameter."""

    name: str
    value: str
    regex: Regex | None = None

    def matches(self, text: str | None) -> bool:
        """Whether it holds for the field's value, None without the field."""
        if text is None:
            return False
        return text == self.value if self.regex is None else self.regex.fits(text)

    def __str__(self) -> str:
        return f"{self.name} {'=' if self.regex is None else '~'} {self.value}"


@dataclass(frozen=True, slots=True)
class HttpMatch:
    """All conditions must hold; none at all holds for every request."""

    path: PathMatch = ANY_PATH
    method: str = ""
    headers: tuple[FieldMatch, ...] = ()
    query: tuple[FieldMatch, ...] = ()
    rank: tuple[int, int, int, int, int] = field(init=False, repr=False, compare=False)
    """Smaller comes first."""

    def __post_init__(self) -> None:
        """Rank it once."""
        path = self.path
        length = 0 if path.kind is PathKind.REGEX else -len(path.value)
        rank = (path.kind.value, length, -bool(self.method), -len(self.headers), -len(self.query))
        object.__setattr__(self, "rank", rank)

    def matches(self, view: RequestView) -> bool:
        """Whether the request is one of those meant."""
        if self.path is not ANY_PATH and not self.path.matches(view.path):
            return False
        if self.method and self.method != view.head.method:
            return False
        headers = view.head.headers
        for each in self.headers:
            if not each.matches(headers.get(each.name)):
                return False
        return all(each.matches(view.query.get(each.name)) for each in self.query)

    def __str__(self) -> str:
        parts = [] if self.path is ANY_PATH else [str(self.path)]
        if self.method:
            parts.append(self.method)
        parts += [f"header {each}" for each in self.headers]
        parts += [f"query {each}" for each in self.query]
        return " and ".join(parts) or "every request"
