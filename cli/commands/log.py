"""`meshbpf log`: the agent's log levels, shown and changed while it runs."""

from __future__ import annotations

import click

from meshbpf.agent.api import LogRequest, LogResult
from meshbpf.cli.client import ask
from meshbpf.cli.options import DURATION, Session, common_options, pass_session
from meshbpf.cli.output import emit, note
from meshbpf.cli.table import table
from meshbpf.cli.units import duration


@click.command("log", short_help="Show or change the agent's log levels.")
@click.option(
    "--level",
    "levels",
    multiple=True,
    metavar="[SCOPE=]LEVEL",
    help="Set LEVEL (trace, debug, info, warn, error, off) for SCOPE, or for all scopes that "
    "have none of their own; may be repeated, and hold several with commas.",
)
@click.option("--reset", is_flag=True, help="Return to the levels that the agent started with.")
@click.option(
    "--for",
    "for_s",
    type=DURATION,
    metavar="TIME",
    help="Take the change back after TIME, for instance 5m.",
)
@common_options
@pass_session
def command(session: Session, levels: tuple[str, ...], reset: bool, for_s: float | None) -> None:
    """Show the agent's log levels, or change them until it ends.

    A scope is what the third column of a log line says: `--level access=debug` tells of
    each connection when it opens, too.
    """
    if for_s is not None and not (levels or reset):
        raise click.UsageError("--for says how long a change lasts: add --level or --reset")
    result = ask(session, LogRequest(level=",".join(levels), reset=reset, for_s=for_s))
    emit(session.output, "Log", result, lambda: view(result))
    if result.for_s is not None:
        note(f"the change is taken back in {duration(result.for_s)}")


def view(result: LogResult) -> str:
    """One scope a line; `*` stands for those without a level of their own."""
    rows = [("*", result.level), *result.scopes.items()]
    return table(("SCOPE", "LEVEL"), rows)
