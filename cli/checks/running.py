"""The agent that runs here, if one does: what it says of itself."""

from __future__ import annotations

from collections.abc import Iterator

from meshbpf.agent.api import StatusRequest, StatusResult
from meshbpf.agent.core.errors import MeshbpfError, UnavailableError
from meshbpf.cli.checks.model import Category, Finding
from meshbpf.cli.client import ask
from meshbpf.cli.options import Session


def running_agent(session: Session) -> tuple[Category, StatusResult | None]:
    """Findings about the agent of the state directory, and its status.

    That none runs is a warning: `check` is also for machines that wait for one.
    """
    try:
        status = ask(session, StatusRequest())
    except UnavailableError as error:
        found = Finding(name="running", outcome="warning", found=error.what, hint=error.hint)
        return Category(name="agent", findings=(found,)), None
    except MeshbpfError as error:
        found = Finding(name="running", outcome="failed", found=error.what, hint=error.hint)
        return Category(name="agent", findings=(found,)), None
    return Category(name="agent", findings=tuple(_findings(status))), status


def _findings(status: StatusResult) -> Iterator[Finding]:
    if status.ready:
        yield Finding(name="ready", outcome="ok", found=f"node {status.node}, {status.version}")
    else:
        yield Finding(
            name="ready",
            outcome="failed",
            found=f"no, waiting for {', '.join(status.pending) or 'nothing it names'}",
            hint="meshbpf status",
        )
    beat = status.heartbeat
    if beat.beating:
        yield Finding(name="heartbeat", outcome="ok", found=f"limit {beat.limit_s:g} s")
    else:
        yield Finding(
            name="heartbeat",
            outcome="failed",
            found="missing",
            consequence="the kernel takes the agent for dead: pods do what --on-agent-down says",
        )
    if status.state.error is None:
        yield Finding(name="mesh state", outcome="ok", found=status.state.origin)
    else:
        yield Finding(
            name="mesh state",
            outcome="failed",
            found=status.state.error.what,
            consequence="the last good state is kept; the file is not followed",
            hint=status.state.error.hint,
        )
    if status.pods.failed:
        yield Finding(
            name="pods",
            outcome="failed",
            found=f"{status.pods.failed} could not be attached",
            hint="meshbpf pods",
        )
    else:
        yield Finding(name="pods", outcome="ok", found=f"{status.pods.attached} attached")
