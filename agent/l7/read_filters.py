"""Reading the filters of a route's rule or backend (Gateway API, HTTPRouteFilter)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from meshbpf.agent.l7.filter import Filter
from meshbpf.agent.l7.rules import (
    NO_FILTERS,
    Backend,
    Cors,
    Filters,
    HeaderEdit,
    Mirror,
    PathEdit,
    Redirect,
    Rewrite,
)
from meshbpf.agent.l7.spec import Value

_DURATION = re.compile(r"(?:[0-9]{1,5}(?:h|ms|m|s)){1,4}")  # GEP-2257
_PART = re.compile(r"([0-9]+)(h|ms|m|s)")
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_|~-]{1,256}")
_REDIRECTS = (301, 302, 303, 307, 308)
# What frames a message is ours to write (RFC 9112, section 6): an object that
# edited it could make two servers read two different requests.
_FRAMING = frozenset({"content-length", "transfer-encoding", "connection", "host", "te", "upgrade"})

ReadBackend = Callable[[Value], Backend]
ReadExtension = Callable[[Value, str, str, str], Filter]
"""Given the reference and its group, kind and name."""


def duration_s(field: Value) -> float:
    """A Gateway API duration in seconds."""
    text = field.text()
    if not _DURATION.fullmatch(text):
        raise field.error(f"{text!r} is no duration: write 10s, 1m30s or 250ms")
    return sum(int(number) * _SECONDS[unit] for number, unit in _PART.findall(text))


def header_name(field: Value) -> str:
    """A header's name, in lower case."""
    text = field.text()
    if not _HEADER_NAME.fullmatch(text):
        raise field.error(f"{text!r} is no header name")
    return text.lower()


def read_filters(
    field: Value | None,
    read_backend: ReadBackend,
    read_extension: ReadExtension,
    *,
    prefix_only: bool | None = None,
) -> Filters:
    """All filters of a list.

    `prefix_only` False: some match of the rule is no prefix, so the prefix
    cannot be replaced. None: the list stands where paths are not edited.
    """
    if field is None:
        return NO_FILTERS
    found = NO_FILTERS
    seen: set[str] = set()
    for item in field.items():
        fields = item.record(("type", *_BODIES))
        kind = item.need(fields, "type")
        text = kind.text()
        body_name = _NAMES.get(text)
        if body_name is None:
            raise kind.error(f"{text} is none of {', '.join(_NAMES)}")
        if text in seen and text not in ("RequestMirror", "ExtensionRef"):
            raise kind.error(f"{text} stands twice")
        seen.add(text)
        body = item.need(fields, body_name)
        if text == "ExtensionRef":
            extension = _extension(body, read_extension)
            found = replace(found, extensions=(*found.extensions, extension))
        else:
            found = _add(found, text, body, read_backend, prefix_only)
    if found.redirect is not None and found.rewrite is not None:
        raise field.error("RequestRedirect and URLRewrite exclude each other")
    return found


def _add(
    found: Filters, kind: str, body: Value, read_backend: ReadBackend, prefix_only: bool | None
) -> Filters:
    match kind:
        case "RequestHeaderModifier":
            return replace(found, request=_edit(body))
        case "ResponseHeaderModifier":
            return replace(found, response=_edit(body))
        case "RequestMirror":
            return replace(found, mirrors=(*found.mirrors, _mirror(body, read_backend)))
        case "CORS":
            return replace(found, cors=_cors(body))
    if prefix_only is None:
        raise body.error(f"{kind} cannot stand here")
    if kind == "RequestRedirect":
        return replace(found, redirect=_redirect(body, prefix_only))
    return replace(found, rewrite=_rewrite(body, prefix_only))


_NAMES = {
    "RequestHeaderModifier": "requestHeaderModifier",
    "ResponseHeaderModifier": "responseHeaderModifier",
    "RequestRedirect": "requestRedirect",
    "URLRewrite": "urlRewrite",
    "RequestMirror": "requestMirror",
    "CORS": "cors",
    "ExtensionRef": "extensionRef",
}
_BODIES = tuple(_NAMES.values())


def _extension(body: Value, read: ReadExtension) -> Filter:
    fields = body.record(("group", "kind", "name"))
    group, kind, name = (body.need(fields, each) for each in ("group", "kind", "name"))
    return read(body, group.text(empty=True), kind.text(), name.text())


def _edit(body: Value) -> HeaderEdit:
    fields = body.record(("set", "add", "remove"))
    removed = fields.get("remove")
    return HeaderEdit(
        _pairs(fields.get("set")),
        _pairs(fields.get("add")),
        () if removed is None else tuple(_editable(item) for item in removed.items()),
    )


def _pairs(field: Value | None) -> tuple[tuple[str, str], ...]:
    if field is None:
        return ()
    pairs = []
    for item in field.items():
        fields = item.record(("name", "value"))
        value = item.need(fields, "value")
        text = value.text(empty=True)
        if any(each in text for each in "\r\n\0"):
            raise value.error("a header's value has no line breaks")
        pairs.append((_editable(item.need(fields, "name")), text))
    return tuple(pairs)


def _editable(field: Value) -> str:
    name = header_name(field)
    if name in _FRAMING:
        raise field.error(f"{name} is not to be edited")
    return name


def _path(field: Value | None, prefix_only: bool) -> PathEdit | None:
    if field is None:
        return None
    fields = field.record(("type", "replaceFullPath", "replacePrefixMatch"))
    kind = field.need(fields, "type").choice(
        {"ReplaceFullPath": "replaceFullPath", "ReplacePrefixMatch": "replacePrefixMatch"}
    )
    value = field.need(fields, kind)
    text = value.text(empty=True)
    if any(each in text for each in "\r\n\0 "):
        raise value.error("a path has no spaces")
    if kind == "replaceFullPath":
        return PathEdit(text if text.startswith("/") else f"/{text}", prefix=False)
    if not prefix_only:
        raise value.error("a prefix can be replaced only where every match is a PathPrefix")
    return PathEdit(text.rstrip("/"), prefix=True)


def _redirect(body: Value, prefix_only: bool) -> Redirect:
    fields = body.record(("scheme", "hostname", "path", "port", "statusCode"))
    status = fields.get("statusCode")
    code = 302 if status is None else status.integer(300, 399)
    if status is not None and code not in _REDIRECTS:
        raise status.error(f"{code} is none of {', '.join(map(str, _REDIRECTS))}")
    scheme, host, port = fields.get("scheme"), fields.get("hostname"), fields.get("port")
    return Redirect(
        status=code,
        scheme=None if scheme is None else scheme.choice({"http": "http", "https": "https"}),
        hostname=None if host is None else _hostname(host),
        path=_path(fields.get("path"), prefix_only),
        port=None if port is None else port.integer(1, 65535),
    )


def _rewrite(body: Value, prefix_only: bool) -> Rewrite:
    fields = body.record(("hostname", "path"))
    host = fields.get("hostname")
    return Rewrite(
        None if host is None else _hostname(host), _path(fields.get("path"), prefix_only)
    )


def _hostname(field: Value) -> str:
    text = field.text()
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?", text):
        raise field.error(f"{text!r} is no hostname")
    return text


def _mirror(body: Value, read_backend: ReadBackend) -> Mirror:
    fields = body.record(("backendRef", "percent", "fraction"))
    backend = read_backend(body.need(fields, "backendRef"))
    percent, fraction = fields.get("percent"), fields.get("fraction")
    if percent is not None and fraction is not None:
        raise percent.error("percent and fraction exclude each other")
    if percent is not None:
        return Mirror(backend, percent.integer(0, 100), 100)
    if fraction is None:
        return Mirror(backend)
    parts = fraction.record(("numerator", "denominator"))
    below = parts.get("denominator")
    denominator = 100 if below is None else below.integer(1, 2**31 - 1)
    return Mirror(backend, fraction.need(parts, "numerator").integer(0, denominator), denominator)


def _cors(body: Value) -> Cors:
    fields: dict[str, Any] = body.record(
        (
            "allowOrigins",
            "allowCredentials",
            "allowMethods",
            "allowHeaders",
            "exposeHeaders",
            "maxAge",
        )
    )

    def texts(name: str) -> tuple[str, ...]:
        field = fields.get(name)
        return () if field is None else tuple(field.texts())

    credentials, age = fields.get("allowCredentials"), fields.get("maxAge")
    return Cors(
        origins=texts("allowOrigins"),
        credentials=credentials is not None and credentials.boolean(),
        methods=texts("allowMethods"),
        headers=texts("allowHeaders"),
        expose=texts("exposeHeaders"),
        max_age_s=5 if age is None else age.integer(1, 2**31 - 1),
    )
