"""What the steering facade takes and gives."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from meshbpf.agent.datapath.codecs import IPAddress, IPNetwork, PodCounters
from meshbpf.agent.datapath.netns import Netns
from meshbpf.bpf import Role

Listeners = Mapping[tuple[Role, int], socket.socket]
"""Listening sockets by role and address family (AF_INET, AF_INET6)."""


class Capture(StrEnum):
    """Which hooks capture outbound connections."""

    AUTO = "auto"  # connect hooks where there is cgroup v2, TC beneath them
    TC = "tc"  # TC alone


class OnAgentDown(StrEnum):
    """What becomes of new connections while no agent answers."""

    CLOSED = "closed"  # those that would need the agent are refused at once
    OPEN = "open"  # they go directly, in the clear


@dataclass(frozen=True, slots=True)
class PodSteering:
    """A pod to attach. `key` is NS/NAME; exemptions count in both directions."""

    key: str
    netns: Netns
    on_agent_down: OnAgentDown = OnAgentDown.CLOSED
    exempt_ports: frozenset[int] = frozenset()
    exempt_cidrs: tuple[IPNetwork, ...] = ()
    exempt_interfaces: frozenset[str] = frozenset()
    dns: bool = False
    """Its DNS queries go to the listeners of the two DNS roles, where there are such."""
    same_node: bool = True
    """The kernel may carry its connections from and to other pods of the node."""
    proxied: bool = False
    """A stock proxy serves its connections: listeners that are not given stay as they are."""


@dataclass(frozen=True, slots=True)
class AttachedPod:
    """A pod as it is attached.

    `host_skipped` says for which interfaces, and why, sources are not checked
    and probes not recognised.
    """

    index: int
    key: str
    cookie: int
    addresses: tuple[IPAddress, ...]
    interfaces: tuple[str, ...]
    host_ifindexes: tuple[int, ...]
    host_skipped: tuple[str, ...]
    on_agent_down: OnAgentDown
    same_node: bool = False
    """The kernel carries connections with other pods of this node that policy allows."""


@dataclass(frozen=True, slots=True)
class SteeringStatistics:
    """Counts since the maps were made; they outlive the agent.

    `decisions` by name of `meshbpf.bpf.Decision`; `pods` by key, what passed
    the host's end of the veth. `heartbeat_age_s` is None before the first beat.
    """

    decisions: Mapping[str, int]
    pods: Mapping[str, PodCounters]
    mesh_prefixes: int
    heartbeat_age_s: float | None
