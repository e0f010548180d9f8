"""Session persistence: what a client brings along says which endpoint it had.

The value is `ENDPOINT.SECONDS`: a digest of the endpoint, and when the session
began. It is no secret and grants nothing; who makes one up chooses an endpoint.
"""

from __future__ import annotations

from meshbpf.agent.l7.message import Headers
from meshbpf.agent.l7.rules import Session, SessionKind


def wanted(session: Session, headers: Headers, now_wall_s: float) -> str:
    """The endpoint that a request is bound to; "" for none."""
    value = _value(session, headers)
    endpoint, _, began = value.partition(".")
    if session.absolute_s and not (
        began.isdecimal() and now_wall_s < int(began) + session.absolute_s
    ):
        return ""
    return endpoint


def remember(
    session: Session, asked: Headers, answer: Headers, endpoint: str, now_wall_s: float
) -> None:
    """Tell the client its session, if it is a new one or one that must be kept alive."""
    value = _value(session, asked)
    known, _, began = value.partition(".")
    same = known == endpoint and bool(wanted(session, asked, now_wall_s))
    if same and not session.idle_s:
        return
    since = began if same and began.isdecimal() else str(int(now_wall_s))
    text = f"{endpoint}.{since}"
    if session.kind is SessionKind.HEADER:
        answer.set(session.name, text)
        return
    age_s = 0.0
    if session.permanent and session.absolute_s:
        age_s = max(int(since) + session.absolute_s - now_wall_s, 0.0)
    if session.idle_s:
        age_s = min(age_s or session.idle_s, session.idle_s)
    lasting = f"; Max-Age={int(age_s)}" if age_s else ""
    answer.add("set-cookie", f"{session.name}={text}; Path=/; HttpOnly{lasting}")


def _value(session: Session, headers: Headers) -> str:
    if session.kind is SessionKind.HEADER:
        return headers.get(session.name) or ""
    for pair in (headers.get("cookie") or "").split(";"):
        name, _, value = pair.strip().partition("=")
        if name.lower() == session.name:
            return value
    return ""
