"""A pod of this node as the forwarder sees it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field

from meshbpf.agent.core.address import IPAddress, SocketAddress
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.tuning import ZTUNNELS, Tuning
from meshbpf.agent.core.workload import Workload
from meshbpf.agent.runtime.pool import TunnelPool
from meshbpf.agent.runtime.sockets import SocketFactory, local_address
from meshbpf.agent.runtime.stream import TunnelStream


@dataclass(slots=True, eq=False)
class LocalPod:
    """One attached pod: who it is, where it lives, and its pool of tunnels."""

    namespace: str
    name: str
    service_account: str
    addresses: frozenset[IPAddress]
    """The pod's own addresses; HBONE may ask for these and no others."""
    sockets: SocketFactory
    index: int = 0
    """The number by which the kernel programs know the pod."""
    cookie: int = 0
    """Of its network namespace: unlike the index, never another pod's."""
    carried: bool = True
    """The kernel may carry its connections with other pods of the node."""
    original: Callable[[socket.socket], SocketAddress] = local_address
    """What the client of an accepted socket has dialed."""
    resolver: SocketAddress | None = None
    """Who is asked what the mesh does not name; None: whom the pod has asked."""
    tuning: Tuning = ZTUNNELS
    pool: TunnelPool = field(init=False)
    streams: set[TunnelStream] = field(default_factory=set)
    """Those that are relayed now, in either direction."""

    def __post_init__(self) -> None:
        self.pool = TunnelPool(self.tuning.tunnel_streams)

    @property
    def key(self) -> str:
        """NS/NAME, as every log line and command names it."""
        return f"{self.namespace}/{self.name}"

    def workload(self, mesh: Snapshot) -> Workload | None:
        """What the mesh state says of this pod, or None when it does not know it (yet).

        The service account must agree: a pod must never be given the
        certificate of another account because a name was reused.
        """
        found = [
            workload
            for workload in mesh.workload_named(self.namespace, self.name)
            if workload.service_account == self.service_account
        ]
        # The same name on two networks or clusters is two workloads; ours is
        # the one that has this pod's address.
        for workload in found:
            if not self.addresses.isdisjoint(workload.addresses):
                return workload
        return found[0] if len(found) == 1 else None
