"""`meshbpf run`: the node agent itself, in the foreground."""

from __future__ import annotations

import os
from typing import Any

import click

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.handover import Channel
from meshbpf.cli.options import Session, common_options, pass_session
from meshbpf.cli.run_options import resolved, run_options, settings_of


@click.command("run", short_help="Run the node agent.")
@run_options
@common_options
@pass_session
def command(session: Session, /, **given: Any) -> int:
    """Run the node agent in the foreground, until SIGTERM or SIGINT.

    Settings come from these options, from MESHBPF_* variables, or from the configuration
    file, in this order; `meshbpf config view --origin` shows which. The state directory
    is made (0700) and locked; pods attached before are taken over again. Logs go to
    stderr. Ready means: the log says so, `meshbpf status` exits 0, and GET
    /healthz/ready answers 200.
    """
    predecessor = Channel.inherited(os.environ)
    try:
        settings = settings_of(resolved(session, given))
        # Only this command pays for trio, OpenSSL and the loader.
        from meshbpf.agent.runtime.app import run

        status: int = run(settings, predecessor)
    except MeshbpfError as error:
        if predecessor is not None:
            predecessor.fail(error)
        raise
    return status
