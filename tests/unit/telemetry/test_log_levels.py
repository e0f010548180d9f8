"""Log levels that change while the agent runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from meshbpf.agent.runtime.log_levels import LevelError, LogLevels, known_scopes, parse
from meshbpf.agent.runtime.logs import Log

pytestmark = pytest.mark.compat

SCOPE = Log("te-scope")


@pytest.fixture
def levels() -> Iterator[LogLevels]:
    root = logging.getLogger()
    before = root.level
    made = LogLevels("info")
    made.change(reset=True)
    yield made
    made.change(reset=True)
    root.setLevel(before)


def enabled(name: str, level: int) -> bool:
    return logging.getLogger(name).isEnabledFor(level)


def test_levels_are_told_as_ztunnel_does(levels: LogLevels) -> None:
    assert str(levels.current()) == "info"
    assert str(levels.change("access=debug")) == "access=debug,info"
    assert str(levels.change("warn")) == "access=debug,warn"
    assert str(levels.change("te-scope:off,error")) == "access=debug,te-scope=off,error"
    assert str(levels.change("access=trace", reset=True)) == "access=debug,info"
    assert str(levels.change(reset=True)) == "info"


def test_levels_have_their_effect_on_one_scope_alone(levels: LogLevels) -> None:
    levels.change("te-scope=debug")
    assert enabled("meshbpf.te-scope", logging.DEBUG)
    assert not enabled("access", logging.DEBUG)
    levels.change("te-scope=off,access=debug")
    assert not enabled("meshbpf.te-scope", logging.CRITICAL)
    assert enabled("access", logging.DEBUG)
    levels.change(reset=True)
    assert enabled("meshbpf.te-scope", logging.INFO)
    assert not enabled("access", logging.DEBUG)


@pytest.mark.parametrize("text", ["loud", "", "=info", "access", "access=", "a=b=info,", "info,,"])
def test_what_is_no_level_changes_nothing(levels: LogLevels, text: str) -> None:
    with pytest.raises(LevelError, match="is not a log level"):
        parse(text)
    with pytest.raises(LevelError):
        levels.change(f"error,{text}")
    assert str(levels.current()) == "info"


def test_an_unknown_scope_is_refused_when_asked_to(levels: LogLevels) -> None:
    assert "te-scope" in known_scopes()
    levels.change("te-scope=debug", only_known=True)
    with pytest.raises(LevelError, match="nothing logs as 'nobody'"):
        levels.change("nobody=debug", only_known=True)


def test_a_change_is_taken_back_unless_somebody_changed_the_same_since(levels: LogLevels) -> None:
    before = levels.current()
    after = levels.change("te-scope=debug,access=debug,warn")
    levels.change("access=error,http=error")
    levels.undo(before, after)
    assert str(levels.current()) == "access=error,http=error,info"
    before = levels.current()
    after = levels.change("access=debug")
    levels.undo(before, after)
    assert str(levels.current()) == "access=error,http=error,info"
