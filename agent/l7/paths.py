"""One spelling for each path, before any policy or route looks at it.

`/admin`, `/x/../admin`, `//admin`, `/%61dmin` and `/admin%2f` may all reach
the same page of a backend. What a policy denies under one spelling must not
pass under another, so the path is rewritten first, and what is forwarded is
what was judged. The levels are those of `meshConfig.pathNormalization`
(istio/api, ProxyPathNormalization).
"""

from __future__ import annotations

import re
from enum import StrEnum

from meshbpf.agent.l7.exchange import Exchange
from meshbpf.agent.l7.filter import CONTINUE, Filter, Outcome, Phase


class PathNormalization(StrEnum):
    """How far a path is rewritten."""

    NONE = "NONE"
    BASE = "BASE"  # dot segments, backslashes, needless percent-encoding (RFC 3986, 6.2.2)
    MERGE_SLASHES = "MERGE_SLASHES"
    DECODE_AND_MERGE_SLASHES = "DECODE_AND_MERGE_SLASHES"  # %2F and %5C are slashes, too


DEFAULT = PathNormalization.BASE

# None of these in a path: it is normal at every level.
_ODD = re.compile(r"[%\\#]|//|/\.")
_ENCODED = re.compile(r"%([0-9A-Fa-f]{2})")
_ENCODED_SLASH = re.compile(r"%(?:2[fF]|5[cC])")
_SLASHES = re.compile(r"//+")
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


def normalize(target: str, level: PathNormalization = DEFAULT) -> str:
    """The path of a request line, its query untouched; a fragment is dropped."""
    path, question, query = target.partition("?")
    if not path.startswith("/") or _ODD.search(path) is None:
        return target  # `*`, or nothing to do
    path = path.partition("#")[0]
    if level is PathNormalization.NONE:
        return f"{path}{question}{query}"
    path = _ENCODED.sub(_decode, path)
    if level is PathNormalization.DECODE_AND_MERGE_SLASHES:
        path = _ENCODED_SLASH.sub("/", path)
    path = path.replace("\\", "/")
    if level is not PathNormalization.BASE:
        path = _SLASHES.sub("/", path)
    return f"{_without_dots(path)}{question}{query}"


def _decode(found: re.Match[str]) -> str:
    value = int(found[1], 16)
    return chr(value) if value in _UNRESERVED else found[0]


def _without_dots(path: str) -> str:
    """RFC 3986, section 5.2.4."""
    kept: list[str] = []
    steps = path.split("/")[1:]
    for step in steps:
        if step == "..":
            if kept:
                kept.pop()
        elif step != ".":
            kept.append(step)
    if steps[-1] in (".", ".."):
        kept.append("")
    return "/" + "/".join(kept)


class NormalizePath(Filter):
    """Stands before everything that reads a path."""

    phase = Phase.CALLER
    name = "path normalization"

    def __init__(self, level: PathNormalization = DEFAULT) -> None:
        self._level = level

    def on_request(self, exchange: Exchange) -> Outcome:
        """Rewrite the path."""
        request = exchange.request
        request.path = normalize(request.path, self._level)
        return CONTINUE
