"""`meshbpf config`: what the agent would run with, and whether it can."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from meshbpf.agent.api import Result
from meshbpf.agent.config import duration_text
from meshbpf.agent.config_keys import KEYS
from meshbpf.agent.config_sources import Resolved
from meshbpf.cli.lazy import Group
from meshbpf.cli.options import Session, common_options, pass_session
from meshbpf.cli.output import emit
from meshbpf.cli.run_options import resolved, run_options, settings_of
from meshbpf.cli.table import EMPTY, table


@click.group("config", cls=Group, short_help="Check or show the agent's configuration.")
@common_options
def command() -> None:
    """Check or show the agent's configuration.

    Settings come from the options of `meshbpf run`, from MESHBPF_* variables, or from
    /etc/meshbpf/config.yaml, in this order. Both verbs take the options of `run` as well,
    to show what it would do with them.
    """


class Setting(Result, frozen=True):
    """One setting of the agent."""

    key: str
    value: Any
    origin: str
    """`default`, `flag`, `env NAME`, or FILE:LINE."""


class ConfigResult(Result, frozen=True):
    """All settings, in the order of docs/configuration.md."""

    file: str
    """The configuration file that was read; empty when there was none."""
    settings: tuple[Setting, ...]


@command.command("check", short_help="Say whether the agent could run with it.")
@run_options
@common_options
@pass_session
def check(session: Session, /, **given: Any) -> None:
    """Say whether the agent could run with this configuration.

    Exits 78 when it could not, naming the line or the variable that is wrong. The files
    that the configuration names are not opened: the agent says what is wrong with them.
    """
    found = resolved(session, given)
    settings_of(found)
    emit(session.output, "Config", _result(found), lambda: _verdict(found))


@command.command("view", short_help="Show every setting that is in force.")
@click.option("--origin", is_flag=True, help="Show where each value comes from.")
@run_options
@common_options
@pass_session
def view(session: Session, /, origin: bool, **given: Any) -> None:
    """Show every setting that is in force, and where it comes from."""
    result = _result(resolved(session, given))
    emit(session.output, "Config", result, lambda: "\n".join(_view(result, origin)))


def _verdict(found: Resolved) -> str:
    named = sum(value.origin != "default" for value in found.values.values())
    where = f"{found.file}: " if found.file else "no configuration file; "
    return f"{where}the agent can run with it ({named} of {len(KEYS)} settings are not the default)"


def _view(result: ConfigResult, origin: bool) -> Iterator[str]:
    rows = ((one.key, _text(one.value), one.origin) for one in result.settings)
    if origin:
        yield table(("KEY", "VALUE", "ORIGIN"), rows)
    else:
        yield table(("KEY", "VALUE"), (row[:2] for row in rows))


def _result(found: Resolved) -> ConfigResult:
    return ConfigResult(
        file=str(found.file or ""),
        settings=tuple(
            Setting(key=name, value=_shown(name, one.value), origin=one.origin)
            for name, one in found.values.items()
        ),
    )


def _shown(name: str, value: Any) -> Any:
    """As it could stand in the file."""
    match value:
        case frozenset():
            return list(_ranges(value)) if name == "exempt-ports" else sorted(value)
        case tuple():
            return [str(item) for item in value]
        case float():
            return duration_text(value)
        case Path():
            return str(value)
    return value


def _ranges(ports: frozenset[int]) -> Iterator[int | str]:
    """Ports in order, those that follow one another as FIRST-LAST."""
    ordered = sorted(ports)
    while ordered:
        length = next((n for n, port in enumerate(ordered) if port != ordered[0] + n), len(ordered))
        run, ordered = ordered[:length], ordered[length:]
        if length > 2:
            yield f"{run[0]}-{run[-1]}"
        else:
            yield from run


def _text(value: Any) -> str:
    match value:
        case None | "" | []:
            return EMPTY
        case bool():
            return str(value).lower()
        case list():
            return ",".join(map(str, value))
    return str(value)
