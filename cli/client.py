"""Asking the agent, for commands: one request, one typed reply."""

from __future__ import annotations

from typing import TypeVar

from meshbpf.agent.api import Request
from meshbpf.agent.api_client import RemoteError, call
from meshbpf.cli.options import Session

R = TypeVar("R")

# A question is answered from memory. Attach and detach load programs and may
# wait for a first compile of the BPF sources, which takes seconds.
ASK_TIMEOUT_S = 10.0
CHANGE_TIMEOUT_S = 60.0


def ask(session: Session, request: Request[R]) -> R:
    """The agent's answer to a question; raises MeshbpfError."""
    return call(session.state_dir, request, timeout_s=ASK_TIMEOUT_S)


def change(session: Session, request: Request[R]) -> R:
    """The agent's answer to a request that changes something; raises MeshbpfError.

    One that waited for a reload is asked of the new agent again.
    """
    try:
        return call(session.state_dir, request, timeout_s=CHANGE_TIMEOUT_S)
    except RemoteError as error:
        if error.code != "replaced":
            raise
    return call(session.state_dir, request, timeout_s=CHANGE_TIMEOUT_S)
