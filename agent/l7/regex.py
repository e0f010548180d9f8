"""Regular expressions from objects that anyone in a namespace may write: RE2's.

Python's `re` backtracks, so that one pattern and one path could hold a worker
for minutes. RE2 takes time linear in the text, and is the dialect that Envoy
has. Nothing else imports it.
"""

from __future__ import annotations

import re2

_MAX_PROGRAM_BYTES = 256 * 1024  # Envoy bounds RE2's program as well


class RegexError(Exception):
    """The text is no regular expression, or too large a one."""


class Regex:
    """One compiled pattern; it must fit the whole text, as Gateway API and Istio have it."""

    __slots__ = ("_fits", "pattern")

    def __init__(self, pattern: str) -> None:
        options = re2.Options()
        options.log_errors = False
        options.max_mem = _MAX_PROGRAM_BYTES
        try:
            self._fits = re2.compile(pattern, options).fullmatch
        except re2.error as error:
            reason = error.args[0] if error.args else "it does not compile"
            text = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
            raise RegexError(text) from None
        self.pattern = pattern

    def fits(self, text: str) -> bool:
        """Whether the pattern matches all of `text`."""
        return self._fits(text) is not None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Regex) and other.pattern == self.pattern

    def __hash__(self) -> int:
        return hash(self.pattern)

    def __repr__(self) -> str:
        return f"Regex({self.pattern!r})"
