"""What else works on this node's packets: other meshes, kube-proxy, Cilium, TC programs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from meshbpf.agent.api import PodsRequest
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.cli.checks.model import Category, Finding
from meshbpf.cli.client import ask
from meshbpf.cli.options import Session

if TYPE_CHECKING:
    from meshbpf.agent.datapath.interplay import Neighbour


def attached_pods(session: Session) -> list[tuple[str, str]]:
    """NS/NAME and network namespace of the pods that the agent steers; none without an agent."""
    try:
        pods = ask(session, PodsRequest()).pods
    except MeshbpfError:
        return []  # that there is no agent is told elsewhere
    return [(pod.pod, pod.netns) for pod in pods if pod.state == "attached"]


def neighbours(found: Iterable[Neighbour]) -> Category:
    """A finding each; what has a consequence is a warning."""
    return Category(
        name="beside meshbpf",
        findings=tuple(
            Finding(
                name=each.name,
                outcome="warning" if each.consequence else "ok",
                found=each.found,
                consequence=each.consequence,
                hint=each.remedy,
            )
            for each in found
        ),
    )
