"""The patterns of AuthorizationPolicy values.

A text is exact, `prefix*`, `*suffix` or `*` (present and not empty); only the
first or last character is ever a wildcard (istio/api, AuthorizationPolicy).
Paths may instead be templates with `{*}` and `{**}`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from meshbpf.agent.core.policy import MatchKind, StringMatch

ONE_SEGMENT = "{*}"
ANY_SEGMENTS = "{**}"

# pchar of RFC 3986 less "*", as Istio allows it in the literal parts of a template.
_LITERAL = re.compile(r"[a-zA-Z0-9\-._~%!$&'()+,;:@=]+")


@dataclass(frozen=True, slots=True)
class Glob:
    """A text with `*` anywhere: namespaces and trust domains.

    Compared with the whole part of the identity. Istio compiles a namespace
    into one regular expression over the whole URI, where `*a` would also match
    by the `sa` that follows every namespace; here it does not.
    """

    text: str
    regex: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Compile."""
        parts = ".*".join(map(re.escape, self.text.split("*")))
        object.__setattr__(self, "regex", re.compile(parts, re.DOTALL))


@dataclass(frozen=True, slots=True)
class PathTemplate:
    """`/shop/{*}/items/{**}`: one segment, and any number of them at the end."""

    text: str
    regex: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Compile; ValueError says why the text is no template."""
        steps, ended = [], False
        for step in self.text.strip("/").split("/"):
            if ended:
                raise ValueError(f"{ANY_SEGMENTS} is not last")
            if step == ONE_SEGMENT:
                steps.append("[^/]+")
            elif step == ANY_SEGMENTS:
                steps.append(".*")
                ended = True
            elif _LITERAL.fullmatch(step):
                steps.append(re.escape(step))
            else:
                raise ValueError(f"the segment {step!r} is neither literal nor {ONE_SEGMENT}")
        start = "/" if self.text.startswith("/") else ""
        end = "/" if self.text.endswith("/") else ""
        object.__setattr__(self, "regex", re.compile(start + "/".join(steps) + end, re.DOTALL))


def path_pattern(value: str) -> StringMatch | PathTemplate:
    """A template where the text has a template's operator; ValueError where it is malformed."""
    if ONE_SEGMENT in value or ANY_SEGMENTS in value:
        return PathTemplate(value)
    if "{" in value or "}" in value:
        raise ValueError(f"braces stand only in {ONE_SEGMENT} and {ANY_SEGMENTS}")
    return StringMatch.read(value)


@dataclass(frozen=True, slots=True)
class RequestPrincipal:
    """`ISSUER/SUBJECT`, each compared with its own claim of the token."""

    issuer: StringMatch
    subject: StringMatch


_ANY = StringMatch(MatchKind.PRESENCE)


def request_principal(value: str) -> RequestPrincipal:
    """How Istio splits it: at the last slash, for an issuer may be a URL.

    pilot/pkg/security/authz/model/generator.go, requestPrincipalGenerator.
    """
    issuer, slash, subject = value.rpartition("/")
    if not slash:
        issuer, subject = value, ""
    if value == "*":
        return RequestPrincipal(_ANY, _ANY)
    if value.startswith("*"):
        if not slash:
            return RequestPrincipal(_ANY, StringMatch(MatchKind.SUFFIX, value[1:]))
        starred = _ANY if issuer == "*" else StringMatch(MatchKind.SUFFIX, issuer[1:])
        return RequestPrincipal(starred, StringMatch(MatchKind.EXACT, subject))
    if value.endswith("*"):
        if not slash:
            return RequestPrincipal(StringMatch(MatchKind.PREFIX, value[:-1]), _ANY)
        starred = _ANY if subject == "*" else StringMatch(MatchKind.PREFIX, subject[:-1])
        return RequestPrincipal(StringMatch(MatchKind.EXACT, issuer), starred)
    return RequestPrincipal(
        StringMatch(MatchKind.EXACT, issuer), StringMatch(MatchKind.EXACT, subject)
    )
