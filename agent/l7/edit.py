"""What a rule's filters do to heads: pure edits of one request or response."""

from __future__ import annotations

from meshbpf.agent.l7.filter import Reply
from meshbpf.agent.l7.message import Headers, RequestHead
from meshbpf.agent.l7.rules import HeaderEdit, PathEdit, Redirect, Rewrite

_WELL_KNOWN = {"http": 80, "https": 443}


def edit_headers(headers: Headers, edit: HeaderEdit) -> None:
    """Set, add, remove, in this order, as Gateway API has it."""
    for name, value in edit.set:
        headers.set(name, value)
    for name, value in edit.add:
        headers.add(name, value)
    for name in edit.remove:
        headers.remove(name)


def edited_path(path: str, edit: PathEdit, matched_prefix: str) -> str:
    """The new path; the query stays. `matched_prefix` has no slash at its end."""
    only, question, query = path.partition("?")
    if edit.prefix:
        rest = only[len(matched_prefix) :]
        new = f"{edit.value}{rest}" or "/"
        if not new.startswith("/"):
            new = f"/{new}"
    else:
        new = edit.value
    return f"{new}{question}{query}"


def rewrite(head: RequestHead, edit: Rewrite, matched_prefix: str) -> None:
    """URLRewrite."""
    if edit.hostname is not None:
        head.authority = edit.hostname
    if edit.path is not None:
        head.path = edited_path(head.path, edit.path, matched_prefix)


def redirect(head: RequestHead, edit: Redirect, matched_prefix: str, port: int) -> Reply:
    """RequestRedirect, for a request to the service's `port`."""
    scheme = edit.scheme or head.scheme
    host = edit.hostname or head.host
    if edit.port is not None:
        port = edit.port
    elif edit.scheme is not None:
        # The scheme's own port, since the port that was dialed speaks another one.
        port = _WELL_KNOWN[scheme]
    shown = "" if port == _WELL_KNOWN.get(scheme) else f":{port}"
    path = head.path if edit.path is None else edited_path(head.path, edit.path, matched_prefix)
    location = f"{scheme}://{host}{shown}{path}"
    return Reply(edit.status, headers=(("location", location),), detail="direct_response")
