"""Log levels while the agent runs: one for all scopes, others for some, for a time if wished.

The words are ztunnel's: `info` for all scopes, `access=debug` for one, several
with commas; `scope:level` is taken too, which istioctl writes. `trace` is as
much as `debug` here, `off` silences a scope.

A scope is what the third column of a log line says. Behind it stand the
loggers `meshbpf.SCOPE` and `meshbpf.agent.runtime.SCOPE`, or one of just that
name (`access`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.runtime.logs import ACCESS, ROOT

OFF: Final = logging.CRITICAL + 10
_NUMBERS: Final = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
    "off": OFF,
}
_NAMES: Final = {
    logging.DEBUG: "debug",
    logging.INFO: "info",
    logging.WARNING: "warn",
    logging.ERROR: "error",
    logging.CRITICAL: "critical",
    OFF: "off",
}
_PREFIXES: Final = (f"{ROOT}.agent.runtime.", f"{ROOT}.")
MAX_SCOPES: Final = 64


class LevelError(MeshbpfError):
    """A text that is no log level, or a scope that nothing logs under."""


@dataclass(frozen=True, slots=True)
class Levels:
    """A level for everything, and other ones for some scopes."""

    default: str
    scopes: Mapping[str, str]

    def __str__(self) -> str:
        """As ztunnel prints it: `access=debug,info`."""
        return ",".join(
            [*(f"{scope}={self.scopes[scope]}" for scope in sorted(self.scopes)), self.default]
        )


def parse(text: str) -> tuple[str | None, dict[str, str]]:
    """The default level, if `text` has one, and the levels by scope. Raises LevelError."""
    default: str | None = None
    scopes: dict[str, str] = {}
    for clause in text.split(","):
        scope, separator, level = clause.strip().replace(":", "=", 1).rpartition("=")
        name = _name(level)
        if name is None or (separator and not scope):
            raise LevelError(
                "bad-log-level",
                f"{clause.strip()!r} is not a log level",
                "write LEVEL or SCOPE=LEVEL with one of: trace, debug, info, warn, error, off",
            )
        if separator:
            scopes[scope] = name
        else:
            default = name
    return default, scopes


def known_scopes() -> tuple[str, ...]:
    """The scopes that this process has loggers for, sorted."""
    found = {ACCESS}
    for name in list(logging.root.manager.loggerDict):
        for prefix in _PREFIXES:
            if name.startswith(prefix):
                found.add(name.removeprefix(prefix))
                break
    return tuple(sorted(scope for scope in found if "." not in scope))


class LogLevels:
    """The levels in force in this process. Used from the event loop's thread."""

    def __init__(self, default: str) -> None:
        """`default` is what the agent was started with, and what `reset` returns to."""
        self._started = _name(default) or "info"
        self._default = self._started
        self._scopes: dict[str, str] = {}

    def current(self) -> Levels:
        """What is in force."""
        return Levels(self._default, dict(self._scopes))

    def change(self, text: str = "", *, reset: bool = False, only_known: bool = False) -> Levels:
        """Set what `text` says on top of what is in force, or of the start's levels on `reset`.

        Raises LevelError, and nothing has changed then. `only_known` refuses
        a scope that nothing logs under: a typing error would go unseen.
        """
        default, scopes = parse(text) if text else (None, {})
        if only_known:
            known = known_scopes()
            for scope in scopes:
                if scope not in known:
                    raise LevelError(
                        "unknown-scope", f"nothing logs as {scope!r}", f"one of: {', '.join(known)}"
                    )
        kept = {} if reset else self._scopes
        if len({*kept, *scopes}) > MAX_SCOPES:
            raise LevelError("too-many-scopes", f"more than {MAX_SCOPES} scopes", "reset first")
        if reset:
            self._apply(Levels(self._started, {}))
        self._apply(Levels(default or self._default, {**self._scopes, **scopes}))
        return self.current()

    def undo(self, before: Levels, after: Levels) -> None:
        """Take one change back, as far as nobody has changed the same levels since."""
        scopes = dict(self._scopes)
        for scope in {*before.scopes, *after.scopes}:
            was, became = before.scopes.get(scope), after.scopes.get(scope)
            if was != became and scopes.get(scope) == became:
                scopes.pop(scope, None)
                if was is not None:
                    scopes[scope] = was
        untouched = before.default == after.default or self._default != after.default
        self._apply(Levels(self._default if untouched else before.default, scopes))

    def _apply(self, levels: Levels) -> None:
        for scope in self._scopes:
            if scope not in levels.scopes:
                for name in _loggers(scope):
                    logging.getLogger(name).setLevel(logging.NOTSET)
        logging.getLogger().setLevel(_NUMBERS[levels.default])
        for scope, level in levels.scopes.items():
            for name in _loggers(scope):
                logging.getLogger(name).setLevel(_NUMBERS[level])
        self._default, self._scopes = levels.default, dict(levels.scopes)


def _loggers(scope: str) -> tuple[str, ...]:
    if scope == ACCESS:
        return (ACCESS,)
    return (scope, *(prefix + scope for prefix in _PREFIXES))


def _name(level: str) -> str | None:
    number = _NUMBERS.get(level.lower())
    return None if number is None else _NAMES[number]
