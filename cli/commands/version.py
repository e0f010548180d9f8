"""`meshbpf version`: of this command, and of the agent if one answers."""

from __future__ import annotations

import platform

import click

from meshbpf import __version__
from meshbpf.agent.api import API_VERSION, ErrorBody, Result, VersionRequest, VersionResult
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.cli.client import ask
from meshbpf.cli.options import Session, common_options, pass_session
from meshbpf.cli.output import emit
from meshbpf.cli.table import facts


class ClientVersion(Result, frozen=True):
    """What this command is."""

    version: str
    api_version: str
    python: str
    kernel: str


class Versions(Result, frozen=True):
    """Both sides of the socket; `agent` is None while none answers, and `error` says why."""

    client: ClientVersion
    agent: VersionResult | None
    error: ErrorBody | None = None


@click.command("version", short_help="Show the versions of the command and the agent.")
@common_options
@pass_session
def command(session: Session) -> None:
    """Show the versions of this command and of the agent, if one answers."""
    client = ClientVersion(
        version=__version__,
        api_version=API_VERSION,
        python=platform.python_version(),
        kernel=platform.release(),
    )
    try:
        versions = Versions(client=client, agent=ask(session, VersionRequest()))
    except MeshbpfError as error:
        # Not a failure of this command: it knows its own version without an agent.
        body = ErrorBody(
            code=error.code, what=error.what, hint=error.hint, exit_status=int(error.exit_status)
        )
        versions = Versions(client=client, agent=None, error=body)
    emit(session.output, "Version", versions, lambda: view(versions))


def view(versions: Versions) -> str:
    """Two lines: this command, and the agent or why there is none."""
    client = versions.client
    if versions.agent is not None:
        agent = versions.agent
        running = f"{agent.version} (Python {agent.python}, API {agent.api_version})"
    else:
        running = f"unknown: {versions.error.what}" if versions.error else "unknown"
    return facts(
        [
            ("command", f"{client.version} (Python {client.python}, API {client.api_version})"),
            ("agent", running),
            ("kernel", client.kernel),
        ]
    )
