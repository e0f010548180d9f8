"""`meshbpf reload`: a new agent in the place of the running one, with no connection lost."""

from __future__ import annotations

import click

from meshbpf.agent.api import ReloadRequest, ReloadResult
from meshbpf.agent.api_client import call
from meshbpf.cli.options import Session, common_options, pass_session
from meshbpf.cli.output import emit
from meshbpf.cli.table import line
from meshbpf.cli.units import count

# A new version compiles its programs before it can say that it is ready.
RELOAD_TIMEOUT_S = 170.0


@click.command("reload", short_help="Replace the running agent, and break no connection.")
@common_options
@pass_session
def command(session: Session) -> None:
    """Start a new agent that takes the place of the running one.

    It reads configuration, CA and mesh state anew, runs the program as it is installed now,
    and takes over pods, sockets and the service. Connections go on in the old agent until
    they end, or until its reload-deadline; new ones are taken by the new agent, and none is
    refused in between. When the new one cannot start, the old one goes on and this
    command says why.
    """
    result = call(session.state_dir, ReloadRequest(), timeout_s=RELOAD_TIMEOUT_S)
    emit(session.output, "Reload", result, lambda: view(result))


def view(result: ReloadResult) -> str:
    """One line."""
    left = ""
    if result.connections:
        left = f", {count(result.connections, 'connection')} in the old one"
    return line(f"reloaded: agent {result.pid} has taken over from {result.predecessor}{left}")
