"""Cross-origin requests, answered as the Fetch standard and Gateway API's HTTPCORSFilter say."""

from __future__ import annotations

from meshbpf.agent.l7.filter import Reply
from meshbpf.agent.l7.message import Headers, RequestHead
from meshbpf.agent.l7.rules import Cors

# Fetch, "CORS-safelisted method": they need no permission.
_SAFE_METHODS = frozenset({"GET", "HEAD", "POST"})


def is_preflight(head: RequestHead) -> bool:
    """Whether a browser asks for permission and for nothing else."""
    return (
        head.method == "OPTIONS"
        and "origin" in head.headers
        and "access-control-request-method" in head.headers
    )


def allowed_origin(cors: Cors, origin: str) -> bool:
    """Whether scripts of this origin may read answers. A `*` in a host stands for labels."""
    return any(_covers(pattern, origin) for pattern in cors.origins)


def preflight(cors: Cors, head: RequestHead) -> Reply:
    """The answer to a preflight; without permission one without the headers that give it."""
    origin = head.headers.get("origin") or ""
    method = head.headers.get("access-control-request-method") or ""
    wanted = head.headers.get("access-control-request-headers") or ""
    if not allowed_origin(cors, origin):
        return Reply(200, detail="cors_rejected")
    headers = [("access-control-allow-origin", _origin(cors, origin)), ("vary", "Origin")]
    if cors.credentials:
        headers.append(("access-control-allow-credentials", "true"))
    if "*" in cors.methods:
        # With credentials the star would be taken for a method's name.
        headers.append(("access-control-allow-methods", method if cors.credentials else "*"))
    elif cors.methods:
        headers.append(("access-control-allow-methods", ", ".join(cors.methods)))
    elif method in _SAFE_METHODS:
        headers.append(("access-control-allow-methods", method))
    if "*" in cors.headers:
        if wanted or not cors.credentials:
            shown = wanted if cors.credentials else "*"
            headers.append(("access-control-allow-headers", shown))
    elif cors.headers:
        headers.append(("access-control-allow-headers", ", ".join(cors.headers)))
    headers.append(("access-control-max-age", str(cors.max_age_s)))
    return Reply(200, headers=tuple(headers), detail="cors_preflight")


def mark(cors: Cors, origin: str, headers: Headers) -> None:
    """Give (or do not give) the answer to an ordinary cross-origin request its permission."""
    if not allowed_origin(cors, origin):
        return
    headers.set("access-control-allow-origin", _origin(cors, origin))
    headers.add("vary", "Origin")
    if cors.credentials:
        headers.set("access-control-allow-credentials", "true")
    if cors.expose:
        headers.set("access-control-expose-headers", ", ".join(cors.expose))


def _origin(cors: Cors, origin: str) -> str:
    return "*" if "*" in cors.origins and not cors.credentials else origin


def _covers(pattern: str, origin: str) -> bool:
    if pattern in ("*", origin):
        return True
    before, star, after = pattern.partition("*")
    return bool(star) and (
        len(origin) > len(before) + len(after)
        and origin.startswith(before)
        and origin.endswith(after)
    )
