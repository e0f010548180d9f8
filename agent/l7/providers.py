"""Extension providers: the services outside that policies and telemetry name.

They stand in the mesh configuration (istio/api, mesh/v1alpha1). Those that
this proxy cannot use are known by name only, so that whoever names one can be
told so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from meshbpf.agent.core.address import AddressError
from meshbpf.agent.core.authority import Authority, parse_authority
from meshbpf.agent.core.policy import StringMatch
from meshbpf.agent.l7.durations import duration_s
from meshbpf.agent.l7.spec import Value

# Istio waits for 600 s by default (extauthz.go, timeoutOrDefault), ten minutes
# in which a client holds a stream; a policy decision is not worth as much.
AUTHZ_TIMEOUT_S = 5.0
OTLP_TIMEOUT_S = 10.0
_FORBIDDEN = 403


@dataclass(frozen=True, slots=True)
class CheckBody:
    """How much of a request's body an authorizer is shown."""

    limit_bytes: int
    allow_partial: bool = False
    as_bytes: bool = False


@dataclass(frozen=True, slots=True)
class Authorizer:
    """An ext_authz service, over HTTP or gRPC."""

    name: str
    target: Authority
    grpc: bool
    timeout_s: float = AUTHZ_TIMEOUT_S
    fail_open: bool = False
    status_on_error: int = _FORBIDDEN
    body: CheckBody | None = None
    # What follows is HTTP's only.
    path_prefix: str = ""
    request_headers: tuple[StringMatch, ...] = ()
    added_headers: tuple[tuple[str, str], ...] = ()
    upstream_headers: tuple[StringMatch, ...] = ()
    """Of an allowing answer, for the backend."""
    denied_headers: tuple[StringMatch, ...] = ()
    """Of a refusing answer, for the client; empty means all."""
    allowed_headers: tuple[StringMatch, ...] = ()
    """Of an allowing answer, for the client."""


@dataclass(frozen=True, slots=True)
class FileLog:
    """`envoyFileAccessLog`: lines to standard output, as text or JSON."""

    name: str
    path: str = "/dev/stdout"
    text: str = ""
    """Envoy's format string; empty for its default."""
    labels: Mapping[str, str] | None = None
    """JSON with these fields, each a format string; empty for Istio's default fields."""


@dataclass(frozen=True, slots=True)
class OtlpTracing:
    """`opentelemetry`: spans to a collector."""

    name: str
    target: Authority
    http_path: str = ""
    """OTLP over HTTP at this path; empty for gRPC."""
    headers: tuple[tuple[str, str], ...] = ()
    timeout_s: float = OTLP_TIMEOUT_S


@dataclass(frozen=True, slots=True)
class Prometheus:
    """Metrics to be scraped: what this proxy always has."""

    name: str


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A provider that this proxy cannot use."""

    name: str
    kind: str


Provider = Authorizer | FileLog | OtlpTracing | Prometheus | Unsupported


def read_provider(value: Value) -> Provider:
    """One entry of `extensionProviders`."""
    entries = value.fields()
    name = value.need(entries, "name").text()
    for kind, read in _READERS.items():
        if kind in entries:
            body = entries[kind]
            return read(name, Value(body.object, body.raw or {}, f"{value.path}.{kind}"))
    return Unsupported(name, ", ".join(sorted(entries.keys() - {"name"})) or "nothing")


def _target(value: Value, fields: Mapping[str, Value]) -> Authority:
    # "namespace/host" says in which namespace a host of several is meant.
    host = value.need(fields, "service").text().rpartition("/")[2]
    port = value.need(fields, "port").integer(1, 65535)
    try:
        return parse_authority(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    except AddressError as error:
        raise fields["service"].error(error.what) from None


def _authorizer(name: str, value: Value, *, grpc: bool) -> Authorizer:
    fields = value.fields()
    status = _FORBIDDEN
    if "statusOnError" in fields:
        written = fields["statusOnError"].text()
        if not (written.isascii() and written.isdigit() and 200 <= int(written) <= 599):
            raise fields["statusOnError"].error(f"{written!r} is no status")
        status = int(written)
    prefix = fields["pathPrefix"].text(empty=True) if "pathPrefix" in fields else ""
    if prefix and not prefix.startswith("/"):
        raise fields["pathPrefix"].error("must begin with /")
    added = fields.get("includeAdditionalHeadersInCheck")
    shown = fields.get("includeRequestHeadersInCheck") or fields.get("includeHeadersInCheck")
    return Authorizer(
        name,
        _target(value, fields),
        grpc,
        duration_s(fields["timeout"]) if "timeout" in fields else AUTHZ_TIMEOUT_S,
        "failOpen" in fields and fields["failOpen"].boolean(),
        status,
        _body(fields.get("includeRequestBodyInCheck")),
        prefix,
        _patterns(shown),
        tuple((key.lower(), each.text()) for key, each in added.entries()) if added else (),
        _patterns(fields.get("headersToUpstreamOnAllow")),
        _patterns(fields.get("headersToDownstreamOnDeny")),
        _patterns(fields.get("headersToDownstreamOnAllow")),
    )


def _http(name: str, value: Value) -> Authorizer:
    return _authorizer(name, value, grpc=False)


def _grpc(name: str, value: Value) -> Authorizer:
    return _authorizer(name, value, grpc=True)


def _body(value: Value | None) -> CheckBody | None:
    if value is None:
        return None
    fields = value.record(("maxRequestBytes", "allowPartialMessage", "packAsBytes"))
    return CheckBody(
        value.need(fields, "maxRequestBytes").integer(1, 16 * 1024 * 1024),
        "allowPartialMessage" in fields and fields["allowPartialMessage"].boolean(),
        "packAsBytes" in fields and fields["packAsBytes"].boolean(),
    )


def _patterns(value: Value | None) -> tuple[StringMatch, ...]:
    found = []
    for item in value.items() if value is not None else ():
        if item.text() == "*":
            raise item.error("a bare * is not supported: name a prefix or a suffix")
        found.append(StringMatch.read(item.text().lower()))
    return tuple(found)


def _file_log(name: str, value: Value) -> FileLog:
    fields = value.fields()
    path = fields["path"].text() if "path" in fields else "/dev/stdout"
    written = fields.get("logFormat")
    if written is None:
        return FileLog(name, path)
    forms = written.record(("text", "labels"))
    if "labels" in forms:
        labels = {key: each.text(empty=True) for key, each in forms["labels"].entries()}
        return FileLog(name, path, labels=labels)
    return FileLog(name, path, forms["text"].text(empty=True) if "text" in forms else "")


def _otlp(name: str, value: Value) -> OtlpTracing:
    fields = value.fields()
    path, headers = "", []
    timeout_s = OTLP_TIMEOUT_S
    if "http" in fields:
        http = fields["http"]
        parts = http.record(("path", "timeout", "headers"))
        path = http.need(parts, "path").text()
        if "timeout" in parts:
            timeout_s = duration_s(parts["timeout"])
        for each in parts["headers"].items() if "headers" in parts else ():
            pair = each.record(("name", "value", "envName"))
            if "value" in pair:
                headers.append((each.need(pair, "name").text().lower(), pair["value"].text()))
    return OtlpTracing(name, _target(value, fields), path, tuple(headers), timeout_s)


def _prometheus(name: str, value: Value) -> Prometheus:
    return Prometheus(name)


_READERS: Mapping[str, Callable[[str, Value], Provider]] = {
    "envoyExtAuthzHttp": _http,
    "envoyExtAuthzGrpc": _grpc,
    "envoyFileAccessLog": _file_log,
    "opentelemetry": _otlp,
    "prometheus": _prometheus,
}
