"""What the CNI plugin says to the agent, in the form of the control schema.

Spoken on a socket of its own (`<state-dir>/cni.sock`), which knows no other
verb: a runtime needs nothing else of the agent.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import msgspec

from meshbpf.agent.api import Request, Result


class CniResult(Result, frozen=True):
    """What became of the call; the plugin prints nothing of it, logs do."""

    outcome: Literal["enrolled", "not-enrolled", "removed", "nothing-to-do", "ready"]
    pod: str = ""


class CniRequest(Request[CniResult], frozen=True):
    """One call of the CNI plugin, as the container runtime made it; on the CNI socket alone."""

    VERB: ClassVar[str] = "cni"
    RESULT: ClassVar[type[Result]] = CniResult

    version: Literal[1]
    command: Literal["ADD", "DEL", "CHECK", "STATUS", "GC"]
    container: str
    """CNI_CONTAINERID: the runtime's id of the pod's sandbox."""
    netns: str
    interface: str
    arguments: str
    """CNI_ARGS."""
    config: msgspec.Raw
    """The network configuration, with the result of the plugins before."""
