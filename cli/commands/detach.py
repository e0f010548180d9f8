"""`meshbpf detach`: stop steering a pod."""

from __future__ import annotations

import click

from meshbpf.agent.api import DetachRequest, DetachResult
from meshbpf.cli.client import change
from meshbpf.cli.options import (
    Session,
    common_options,
    namespace_option,
    pass_session,
    pod_key,
    pod_option,
)
from meshbpf.cli.output import emit
from meshbpf.cli.table import line


@click.command("detach", short_help="Stop steering a pod, and leave no trace.")
@pod_option
@namespace_option
@common_options
@pass_session
def command(session: Session, pod: str, namespace: str | None) -> None:
    """Stop steering a pod, and leave no trace in it.

    Connections that the agent carries for the pod end. It works also when the
    pod's network namespace is gone.
    """
    result = change(session, DetachRequest(pod=pod_key(pod, namespace)))
    emit(session.output, "Detach", result, lambda: view(result))


def view(result: DetachResult) -> str:
    """One line: what happened."""
    if result.outcome == "detached":
        return line(f"pod {result.pod} detached")
    return line(f"pod {result.pod} was not attached")
