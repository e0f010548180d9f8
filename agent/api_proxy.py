"""What `status` says of a stock proxy."""

from __future__ import annotations

from typing import Literal

from meshbpf.agent.api_envelope import Result


class ProxyInfo(Result, frozen=True):
    """The proxy that serves the pods' connections in the agent's place."""

    kind: Literal["ztunnel"]
    socket: str
    """Where it asks for pods."""
    pid: int
    """The newest that is connected; 0: none is, and what an earlier one serves goes on."""
    unserved: tuple[str, ...] = ()
    """Pods that it has not taken, or not yet."""
