"""The forwarder: serves all captured connections of all pods on this node.

One nursery per pod holds its listeners, tunnels and connections; nothing that
goes wrong in a connection leaves its task. Cancelling a pod's `serve` ends
everything of it at once: tunnels say GOAWAY, connections are reset, so peers
know within two seconds. `drain` ends it in order: tunnels say GOAWAY and go
with their last stream.
"""

from __future__ import annotations

import errno
import logging
import math
import random
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import trio

from meshbpf.agent.datapath.steering import Role
from meshbpf.agent.runtime.bounds import Bounds
from meshbpf.agent.runtime.carrier import Carrier
from meshbpf.agent.runtime.connections import ConnectionRegistry, ConnectionStatistics
from meshbpf.agent.runtime.dns_metrics import DnsMetrics
from meshbpf.agent.runtime.dns_proxy import DnsProxy
from meshbpf.agent.runtime.gate import Gate
from meshbpf.agent.runtime.hostnames import Hostnames
from meshbpf.agent.runtime.identity_source import Identities
from meshbpf.agent.runtime.inbound import Inbound
from meshbpf.agent.runtime.local_pod import LocalPod
from meshbpf.agent.runtime.mesh_view import MeshView
from meshbpf.agent.runtime.outbound import Outbound
from meshbpf.agent.runtime.pool import PoolStatistics
from meshbpf.agent.runtime.sockets import SocketFactory, hang_up, prepare
from meshbpf.agent.runtime.stream import TunnelStream
from meshbpf.agent.runtime.tasks import guarded

__all__ = [
    "ConnectionRegistry",
    "Forwarder",
    "ForwarderStatistics",
    "Identities",
    "LocalPod",
    "SocketFactory",
]

log = logging.getLogger(__name__)

_ACCEPT_BATCH = 32
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_EXHAUSTED_WAIT_S = 0.1
EXHAUSTED_FOR_S = 5.0
"""How long it is told that nothing could be accepted, once it can."""
MEMORY_LOOK_S = 0.5
# accept(2): the connection broke while it was queued; the next may be fine.
_BROKEN_IN_QUEUE = frozenset(
    {
        errno.ECONNABORTED,
        errno.EPROTO,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENONET,
        errno.ENOPROTOOPT,
        errno.EOPNOTSUPP,
        errno.EPERM,
    }
)


@dataclass(frozen=True, slots=True)
class ForwarderStatistics:
    """The forwarder's part of `status`."""

    connections: ConnectionStatistics
    pools: Mapping[str, PoolStatistics]
    """By pod."""
    accept_failures: int
    """Times that a listener ran out of descriptors or memory."""
    turned_away: int
    """Connections that were reset because their pod had its share."""


@dataclass(slots=True, eq=False)
class _Served:
    """A pod while it is served."""

    pod: LocalPod
    inbound: Inbound
    carried: int = 0
    """Accepted sockets that are not done with: connections and tunnels of others."""
    turned_away: int = 0
    cut_for_memory: int = 0


class Forwarder:
    """Serves pods; see the module."""

    def __init__(
        self,
        mesh: MeshView,
        identities: Identities,
        connections: ConnectionRegistry,
        rng: random.Random | None = None,
        *,
        dns_metrics: DnsMetrics | None = None,
        cluster_domain: str = "cluster.local",
        carrier: Carrier | None = None,
        gate: Gate | None = None,
        bounds: Bounds | None = None,
    ) -> None:
        self._bounds = bounds or Bounds.of_process()
        self._turned_away = 0
        self._carrier = carrier
        self._mesh = mesh
        self._identities = identities
        self._connections = connections
        self._rng = rng or random.Random()  # noqa: S311 - it picks endpoints, no secrets
        self._hostnames = Hostnames()
        self._dns_metrics = dns_metrics or DnsMetrics()
        self._cluster_domain = cluster_domain
        self.gate = gate or Gate()
        """Whether any pod's connections are accepted."""
        self._served: dict[str, _Served] = {}
        self._carried = 0
        self._idle = trio.Event()
        self._accept_failures = 0
        self._exhausted_at = -math.inf

    async def serve(
        self, pod: LocalPod, listeners: Mapping[tuple[Role, int], socket.socket]
    ) -> None:
        """Serve one pod until cancelled. The listeners stay the caller's to close."""
        served: _Served | None = None
        try:
            async with trio.open_nursery() as nursery:
                outbound = Outbound(
                    pod,
                    self._mesh,
                    self._identities,
                    self._connections,
                    nursery,
                    self._rng,
                    self._hostnames.addresses,
                    self._carrier,
                )
                inbound = Inbound(
                    pod,
                    self._mesh,
                    self._identities,
                    self._connections,
                    nursery,
                    self.gate,
                    self._carrier,
                )
                served = self._served[pod.key] = _Served(pod, inbound)
                names = DnsProxy(
                    pod,
                    self._mesh,
                    self._dns_metrics,
                    nursery,
                    domain=self._cluster_domain,
                    rng=self._rng,
                    gate=self.gate,
                )
                handlers = {
                    Role.OUTBOUND: outbound.serve,
                    Role.INBOUND: inbound.serve_plain,
                    Role.HBONE: inbound.serve_hbone,
                    Role.DNS: names.serve_tcp,
                }
                for (role, _family), listener in listeners.items():
                    if role is Role.DNS_UDP:
                        nursery.start_soon(names.serve_udp, listener)
                        continue
                    nursery.start_soon(self._accept, nursery, served, listener, handlers[role])
        finally:
            if self._served.get(pod.key) is served:
                del self._served[pod.key]
            self._look_whether_idle()

    def drain(self, pods: Iterable[str] | None = None) -> None:
        """Have the tunnels of these pods (all of them: None) end with their last streams.

        What is accepted later is not affected: close the gate for that.
        """
        for key in list(self._served) if pods is None else pods:
            if (served := self._served.get(key)) is not None:
                served.inbound.drain()
                served.pod.pool.drain()

    @property
    def carried(self) -> int:
        """Accepted sockets that are not done with."""
        return self._carried

    def turned_away(self) -> dict[str, int]:
        """By pod: connections that were reset because it had its share."""
        return {key: served.turned_away for key, served in self._served.items()}

    def buffered(self) -> dict[str, int]:
        """By pod: bytes that its apps, or its peers' apps, have not taken yet."""
        return {
            key: sum(len(stream.pending) for stream in served.pod.streams)
            for key, served in self._served.items()
        }

    def cut_for_memory(self) -> dict[str, int]:
        """By pod: connections that were reset because it held more bytes than it may."""
        return {key: served.cut_for_memory for key, served in self._served.items()}

    @property
    def exhausted(self) -> bool:
        """Connections could not be accepted just now, for want of descriptors or memory."""
        return trio.current_time() - self._exhausted_at < EXHAUSTED_FOR_S

    async def bound_memory(self) -> None:
        """Look again and again whether a pod holds more bytes than it may, until cancelled."""
        while True:
            await trio.sleep(MEMORY_LOOK_S)
            for served in list(self._served.values()):
                held = [(len(stream.pending), stream) for stream in served.pod.streams]
                greatest = self._bounds.excess(held)
                if greatest:
                    self._relieve(served, greatest)

    async def idle(self) -> None:
        """Return when nothing is carried."""
        while self.carried:
            self._idle = trio.Event()
            await self._idle.wait()

    def statistics(self) -> ForwarderStatistics:
        """For `status`."""
        return ForwarderStatistics(
            connections=self._connections.statistics(),
            pools={key: served.pod.pool.statistics() for key, served in self._served.items()},
            accept_failures=self._accept_failures,
            turned_away=self._turned_away,
        )

    async def _accept(
        self,
        nursery: trio.Nursery,
        served: _Served,
        listener: socket.socket,
        handler: Callable[[socket.socket], Awaitable[None]],
    ) -> None:
        # Accepted sockets inherit the options of the listener, which saves
        # seven system calls for each of them.
        prepare(listener, served.pod.tuning.keepalive)
        while True:
            await self.gate.wait_readable(listener)
            for _ in range(_ACCEPT_BATCH):
                try:
                    sock, _address = listener.accept()
                except BlockingIOError:
                    break
                except OSError as error:
                    if error.errno in _BROKEN_IN_QUEUE:
                        continue
                    if error.errno not in _EXHAUSTED:
                        raise
                    self._accept_failures += 1
                    self._exhausted_at = trio.current_time()
                    log.error("cannot accept: %s; connections wait in the queue", error.strerror)
                    await trio.sleep(_EXHAUSTED_WAIT_S)
                    break
                sock.setblocking(False)
                if not self._bounds.admits(served.carried, self.carried, len(self._served)):
                    self._turn_away(served, sock)
                    continue
                served.carried += 1
                self._carried += 1
                nursery.start_soon(self._carry, served, handler, sock)

    async def _carry(
        self,
        served: _Served,
        handler: Callable[[socket.socket], Awaitable[None]],
        sock: socket.socket,
    ) -> None:
        try:
            await guarded(handler, sock)
        finally:
            served.carried -= 1
            self._carried -= 1
            self._look_whether_idle()

    def _turn_away(self, served: _Served, sock: socket.socket) -> None:
        hang_up(sock, finished=False)
        self._turned_away += 1
        served.turned_away += 1
        # Each time it has doubled: a flood of these must not become one of lines.
        if served.turned_away & (served.turned_away - 1) == 0:
            log.warning(
                "pod %s has %d connections, its share: %d turned away",
                served.pod.key,
                served.carried,
                served.turned_away,
            )

    def _relieve(self, served: _Served, greatest: Sequence[TunnelStream]) -> None:
        served.cut_for_memory += len(greatest)
        log.warning(
            "pod %s holds more than %d bytes that nobody reads: %d connections reset",
            served.pod.key,
            self._bounds.memory_bytes,
            len(greatest),
        )
        for stream in greatest:
            stream.give_up("the pod held more unread bytes than it may")

    def _look_whether_idle(self) -> None:
        if not self.carried:
            self._idle.set()
