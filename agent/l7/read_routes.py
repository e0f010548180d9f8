"""Reading HTTPRoute, GRPCRoute, TCPRoute and TLSRoute objects, as far as a mesh uses them.

`hostnames` are not looked at: for a route attached to a Service the address
that was dialed decides, whatever the Host header says (GAMMA).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from meshbpf.agent.core.objects import KubeObject
from meshbpf.agent.l7.match import (
    ANY_PATH,
    FieldMatch,
    HttpMatch,
    PathKind,
    PathMatch,
)
from meshbpf.agent.l7.read_filters import duration_s, header_name, read_filters
from meshbpf.agent.l7.references import References
from meshbpf.agent.l7.regex import Regex, RegexError
from meshbpf.agent.l7.rules import (
    Backend,
    Entry,
    Filters,
    HttpRule,
    Retry,
    Session,
    SessionKind,
    Shares,
    TcpRule,
)
from meshbpf.agent.l7.spec import Value

_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")
_SPEC = ("parentRefs", "hostnames", "rules", "useDefaultGateways")
_MATCH_LIMIT = 64  # as Gateway API's schema; it bounds what one rule costs a request


@dataclass(frozen=True, slots=True)
class ParentRef:
    """One parentRef of a route to a Service or ServiceEntry."""

    kind: str
    namespace: str
    name: str
    port: int
    """0: every port."""
    path: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class ReadRoute:
    """One route, parsed."""

    parents: tuple[ParentRef, ...]
    entries: tuple[Entry, ...] = ()
    tcp: TcpRule | None = None


def read_route(route: KubeObject, references: References) -> ReadRoute:
    """Parse a route of any kind. Raises ObjectError."""
    spec = Value.spec(route)
    fields = spec.record(_SPEC)
    parents = tuple(_parents(fields.get("parentRefs"), route))
    services = {(each.namespace, each.name) for each in parents}
    rules = fields.get("rules")
    if route.key.kind in ("TCPRoute", "TLSRoute"):
        return ReadRoute(parents, tcp=_tcp_rule(spec, rules, references, services))
    if rules is None:
        if route.key.kind == "GRPCRoute":
            raise spec.error("a GRPCRoute needs rules")
        return ReadRoute(parents)
    age = (str(route.metadata.get("creationTimestamp") or ""), f"{route.namespace}/{route.name}")
    entries: list[Entry] = []
    for index, rule in enumerate(rules.items()):
        read = _grpc_rule if route.key.kind == "GRPCRoute" else _http_rule
        matches, parsed = read(rule, index, references, services)
        entries += [Entry(each, parsed, (*age, index)) for each in matches]
    return ReadRoute(parents, tuple(entries))


def _parents(field: Value | None, route: KubeObject) -> list[ParentRef]:
    """Those that are services; Gateways of an ingress are others' business."""
    found = []
    for item in () if field is None else field.items():
        fields = item.record(("group", "kind", "name", "namespace", "port", "sectionName"))
        kind = fields.get("kind")
        if kind is None or kind.text() not in ("Service", "ServiceEntry"):
            continue
        space, port = fields.get("namespace"), fields.get("port")
        found.append(
            ParentRef(
                kind.text(),
                route.namespace if space is None else space.text(),
                item.need(fields, "name").text(),
                0 if port is None else port.integer(1, 65535),
                item.path,
            )
        )
    return found


# --- HTTPRoute -------------------------------------------------------------------

_HTTP_RULE = (
    "name",
    "matches",
    "filters",
    "backendRefs",
    "timeouts",
    "retry",
    "sessionPersistence",
)


def _http_rule(
    rule: Value, index: int, references: References, parents: Collection[tuple[str, str]]
) -> tuple[list[HttpMatch], HttpRule]:
    fields = rule.record(_HTTP_RULE)
    matches = _matches(fields.get("matches"), _http_match)
    prefix_only = all(each.path.kind is PathKind.PREFIX for each in matches)
    filters, backends = _actions(fields, references, parents, prefix_only)
    if filters.redirect is not None and backends:
        raise rule.error("a rule that redirects has no backendRefs")
    timeout_s, try_s = _timeouts(fields.get("timeouts"))
    retry = fields.get("retry")
    session = fields.get("sessionPersistence")
    return matches, HttpRule(
        name=_rule_name(rule, fields, index),
        backends=Shares(backends),
        filters=filters,
        timeout_s=timeout_s,
        try_timeout_s=try_s,
        retry=Retry() if retry is None else _retry(retry),
        retry_asked=retry is not None,
        session=None if session is None else _session(session),
    )


def _rule_name(rule: Value, fields: dict[str, Value], index: int) -> str:
    named = fields.get("name")
    shown = str(index) if named is None else named.text()
    return f"{rule.object.key}, rule {shown}"


def _matches(field: Value | None, read: Callable[[Value], HttpMatch]) -> list[HttpMatch]:
    items = [] if field is None else list(field.items())
    if field is not None and len(items) > _MATCH_LIMIT:
        raise field.error(f"a rule has at most {_MATCH_LIMIT} matches")
    return [read(item) for item in items] or [HttpMatch()]


def _http_match(item: Value) -> HttpMatch:
    fields = item.record(("path", "headers", "queryParams", "method"))
    path, method = fields.get("path"), fields.get("method")
    return HttpMatch(
        path=ANY_PATH if path is None else _path(path),
        method="" if method is None else method.choice({each: each for each in _METHODS}),
        headers=_fields(fields.get("headers"), headers=True),
        query=_fields(fields.get("queryParams"), headers=False),
    )


def _path(field: Value) -> PathMatch:
    fields = field.record(("type", "value"))
    kind = fields.get("type")
    which = (
        PathKind.PREFIX
        if kind is None
        else kind.choice(
            {
                "Exact": PathKind.EXACT,
                "PathPrefix": PathKind.PREFIX,
                "RegularExpression": PathKind.REGEX,
            }
        )
    )
    value = fields.get("value")
    text = "/" if value is None else value.text()
    if which is PathKind.REGEX:
        return PathMatch(which, text, _regex(value or field, text))
    if not text.startswith("/") or "//" in text or "/../" in text or "/./" in text:
        raise (value or field).error("a path begins with / and has no //, /./ or /../")
    if which is PathKind.EXACT:
        return PathMatch(which, text)
    stripped = text.rstrip("/")
    return PathMatch(which, stripped) if stripped else ANY_PATH


def _fields(field: Value | None, *, headers: bool) -> tuple[FieldMatch, ...]:
    found: dict[str, FieldMatch] = {}
    for item in () if field is None else field.items():
        fields = item.record(("type", "name", "value"))
        name_field = item.need(fields, "name")
        name = header_name(name_field) if headers else name_field.text()
        kind, value = fields.get("type"), item.need(fields, "value")
        text = value.text(empty=True)
        regex = None
        if kind is not None and kind.choice({"Exact": False, "RegularExpression": True}):
            regex = _regex(value, text)
        # Gateway API: of several entries with one name the first counts.
        found.setdefault(name, FieldMatch(name, text, regex))
    return tuple(found.values())


def _regex(field: Value, text: str) -> Regex:
    try:
        return Regex(text)
    except RegexError as error:
        raise field.error(f"{text!r} is no RE2 expression: {error}") from None


def _timeouts(field: Value | None) -> tuple[float, float]:
    if field is None:
        return 0.0, 0.0
    fields = field.record(("request", "backendRequest"))
    whole, one = fields.get("request"), fields.get("backendRequest")
    whole_s = 0.0 if whole is None else duration_s(whole)
    one_s = 0.0 if one is None else duration_s(one)
    if one is not None and whole_s and one_s > whole_s:
        raise one.error("a backend request cannot be given longer than the whole request")
    return whole_s, one_s


def _retry(field: Value) -> Retry:
    fields = field.record(("codes", "attempts", "backoff"))
    codes, attempts, backoff = fields.get("codes"), fields.get("attempts"), fields.get("backoff")
    plain = Retry()
    return Retry(
        frozenset() if codes is None else frozenset(c.integer(400, 599) for c in codes.items()),
        plain.attempts if attempts is None else attempts.integer(0, 10),
        plain.backoff_s if backoff is None else duration_s(backoff),
    )


def _session(field: Value) -> Session:
    fields = field.record(("sessionName", "absoluteTimeout", "idleTimeout", "type", "cookieConfig"))
    name, kind, cookie = fields.get("sessionName"), fields.get("type"), fields.get("cookieConfig")
    absolute, idle = fields.get("absoluteTimeout"), fields.get("idleTimeout")
    permanent = False
    if cookie is not None:
        lifetime = cookie.record(("lifetimeType",)).get("lifetimeType")
        permanent = lifetime is not None and lifetime.choice({"Permanent": True, "Session": False})
    if permanent and absolute is None:
        raise field.error("a permanent cookie needs an absoluteTimeout")
    which = SessionKind.COOKIE if kind is None else kind.choice({k.value: k for k in SessionKind})
    default = "meshbpf-session" if which is SessionKind.COOKIE else "x-meshbpf-session"
    return Session(
        name=default if name is None else header_name(name),
        kind=which,
        permanent=permanent,
        absolute_s=0.0 if absolute is None else duration_s(absolute),
        idle_s=0.0 if idle is None else duration_s(idle),
    )


# --- GRPCRoute -------------------------------------------------------------------


def _grpc_rule(
    rule: Value, index: int, references: References, parents: Collection[tuple[str, str]]
) -> tuple[list[HttpMatch], HttpRule]:
    fields = rule.record(("name", "matches", "filters", "backendRefs", "sessionPersistence"))
    matches = _matches(fields.get("matches"), _grpc_match)
    filters, backends = _actions(fields, references, parents, None)
    session = fields.get("sessionPersistence")
    return matches, HttpRule(
        name=_rule_name(rule, fields, index),
        backends=Shares(backends),
        filters=filters,
        session=None if session is None else _session(session),
    )


def _grpc_match(item: Value) -> HttpMatch:
    fields = item.record(("method", "headers"))
    method = fields.get("method")
    return HttpMatch(
        path=ANY_PATH if method is None else _grpc_path(method),
        headers=_fields(fields.get("headers"), headers=True),
    )


def _grpc_path(field: Value) -> PathMatch:
    """`/service/method`: what gRPC puts into `:path`."""
    fields = field.record(("type", "service", "method"))
    kind = fields.get("type")
    regular = kind is not None and kind.choice({"Exact": False, "RegularExpression": True})
    service, method = fields.get("service"), fields.get("method")
    if service is None and method is None:
        raise field.error("service, method, or both must be there")
    if regular:
        parts = ["[^/]+" if one is None else f"(?:{one.text()})" for one in (service, method)]
        text = "/" + "/".join(parts)
        return PathMatch(PathKind.REGEX, text, _regex(field, text))
    if method is None:
        assert service is not None  # noqa: S101 (one of both is there)
        return PathMatch(PathKind.PREFIX, f"/{service.text()}")
    if service is None:
        text = "/[^/]+/" + _quoted(method.text())
        return PathMatch(PathKind.REGEX, text, _regex(field, text))
    return PathMatch(PathKind.EXACT, f"/{service.text()}/{method.text()}")


def _quoted(text: str) -> str:
    return "".join(each if each.isalnum() or each == "_" else f"\\{each}" for each in text)


# --- all -------------------------------------------------------------------------


def _actions(
    fields: dict[str, Value],
    references: References,
    parents: Collection[tuple[str, str]],
    prefix_only: bool | None,
) -> tuple[Filters, list[Backend]]:
    def mirrored(ref: Value) -> Backend:
        return references.backend(ref, parents)

    def of_backend(field: Value | None) -> Filters:
        return read_filters(field, mirrored, references.extension)

    refs = fields.get("backendRefs")
    backends = [
        references.backend(ref, parents, of_backend)
        for ref in (() if refs is None else refs.items())
    ]
    filters = read_filters(
        fields.get("filters"), mirrored, references.extension, prefix_only=prefix_only
    )
    return filters, backends


def _tcp_rule(
    spec: Value,
    rules: Value | None,
    references: References,
    parents: Collection[tuple[str, str]],
) -> TcpRule:
    items = [] if rules is None else list(rules.items())
    if len(items) != 1:
        raise (rules or spec).error("a TCPRoute or TLSRoute has one rule")
    fields = items[0].record(("name", "backendRefs"))
    refs = items[0].need(fields, "backendRefs")
    backends = [references.backend(ref, parents) for ref in refs.items()]
    return TcpRule(_rule_name(items[0], fields, 0), Shares(backends))
