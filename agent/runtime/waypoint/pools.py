"""Connections to endpoints, kept for the next request, and dropped when their endpoint goes.

A key is one endpoint of one backend, as it was routed to: workload, address,
whom it must prove to be, and protocol. When a new mesh state no longer leads
there, the idle connections are closed at once and those in use end with their
request: a pod that was scaled down is asked nothing more, and an address that
a new pod has got meets no connection of the old one.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import trio

from meshbpf.agent.core.address import SocketAddress
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.route import HboneRoute
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import TunnelProtocol, Workload
from meshbpf.agent.l7.balancer import Choice
from meshbpf.agent.runtime.waypoint.channel import Channel, SocketChannel
from meshbpf.agent.runtime.waypoint.dial import Dialer
from meshbpf.agent.runtime.waypoint.http1_client import Http1Connection
from meshbpf.agent.runtime.waypoint.http2_client import Http2Client
from meshbpf.agent.runtime.waypoint.limits import Limits
from meshbpf.agent.runtime.waypoint.message import UpstreamRequest

_SWEEP_S = 5.0


class Key(NamedTuple):
    """Connections with one key may stand for one another."""

    uid: str
    target: SocketAddress
    hbone: bool
    expected: frozenset[SpiffeId]
    http2: bool


@dataclass(slots=True, eq=False)
class _Pool:
    idle: deque[Http1Connection] = field(default_factory=deque)
    shared: list[Http2Client] = field(default_factory=list)
    dialing: trio.Lock = field(default_factory=trio.Lock)
    gone: bool = False


@dataclass(frozen=True, slots=True)
class PoolsStatistics:
    """Connections to endpoints."""

    endpoints: int
    idle: int
    shared: int
    dialed: int
    reused: int
    evicted: int
    """Pools whose endpoint went."""


class Pools:
    """All of one process."""

    def __init__(self, dialer: Dialer, nursery: trio.Nursery, limits: Limits) -> None:
        self._dialer = dialer
        self._nursery = nursery
        self._limits = limits
        self._pools: dict[Key, _Pool] = {}
        self._dialed = self._reused = self._evicted = 0

    async def acquire(
        self, own: Workload, choice: Choice, *, http2: bool, fresh: bool = False
    ) -> UpstreamRequest:
        """A connection for one request. `fresh`: none that has served before.

        Raises MeshbpfError or OSError when it cannot be dialed.
        """
        key = _key(choice, http2)
        pool = self._pools.get(key)
        if pool is None:
            pool = self._pools[key] = _Pool()
        if http2:
            return await self._shared(own, choice, pool)
        return await self._alone(own, choice, pool, fresh=fresh)

    async def open(self, own: Workload, choice: Choice) -> Channel:
        """A connection of its own, for an opaque stream."""
        self._dialed += 1
        return await self._dialer.open(own, choice.route)

    def evict(self, mesh: Snapshot) -> None:
        """Drop what `mesh` no longer leads to."""
        for key in [key for key in self._pools if not _stands(mesh, key)]:
            pool = self._pools.pop(key)
            pool.gone = True
            self._evicted += 1
            while pool.idle:
                _drop(pool.idle.pop())
            for client in list(pool.shared):
                client.drain()

    async def sweep(self) -> None:
        """Close what has been idle for long, until cancelled."""
        while True:
            await trio.sleep(_SWEEP_S)
            before_s = trio.current_time() - self._limits.pool_idle_s
            for key, pool in list(self._pools.items()):
                while pool.idle and pool.idle[0].idle_since_s < before_s:
                    _drop(pool.idle.popleft())
                for client in list(pool.shared):
                    if not client.connection.streams and client.idle_since_s < before_s:
                        client.drain()
                if not (pool.idle or pool.shared or pool.dialing.locked()):
                    self._pools.pop(key, None)

    def statistics(self) -> PoolsStatistics:
        """For metrics."""
        pools = self._pools.values()
        return PoolsStatistics(
            endpoints=len(self._pools),
            idle=sum(len(pool.idle) for pool in pools),
            shared=sum(len(pool.shared) for pool in pools),
            dialed=self._dialed,
            reused=self._reused,
            evicted=self._evicted,
        )

    # --- HTTP/1.1 -----------------------------------------------------------------

    async def _alone(
        self, own: Workload, choice: Choice, pool: _Pool, *, fresh: bool
    ) -> Http1Connection:
        while pool.idle and not fresh:
            # The newest: the others may then fall idle for good.
            connection = pool.idle.pop()
            connection.channel.watch_end(None)
            channel = connection.channel
            if isinstance(channel, SocketChannel) and channel.idle_ended():
                channel.close()
                continue
            self._reused += 1
            return connection
        channel = await self._dialer.open(own, choice.route)
        self._dialed += 1
        connection = Http1Connection(channel, self._limits)
        connection.on_free = lambda free: self._free(pool, free)
        return connection

    def _free(self, pool: _Pool, connection: Http1Connection) -> None:
        """It is idle now, or closed."""
        if connection.draining:
            return
        if pool.gone or len(pool.idle) >= self._limits.pool_idle_connections:
            connection.channel.close()
            return
        connection.idle_since_s = trio.current_time()
        pool.idle.append(connection)

        def ended() -> None:
            # It has been closed, or speaks unasked: no request may be lost on it.
            if connection in pool.idle:
                pool.idle.remove(connection)
                connection.channel.close()

        connection.channel.watch_end(ended)

    # --- HTTP/2 -------------------------------------------------------------------

    async def _shared(self, own: Workload, choice: Choice, pool: _Pool) -> UpstreamRequest:
        for client in pool.shared:
            if client.free:
                self._reused += 1
                return client.open()
        async with pool.dialing:
            for client in pool.shared:
                if client.free:
                    self._reused += 1
                    return client.open()
            channel = await self._dialer.open(own, choice.route)
            self._dialed += 1
            client = Http2Client(channel, self._limits, self._nursery)
            client.idle_since_s = trio.current_time()

            def changed() -> None:
                if client.over and client in pool.shared:
                    pool.shared.remove(client)

            client.on_change_call = changed
            pool.shared.append(client)
            await client.start()
            return client.open()


def _drop(connection: Http1Connection) -> None:
    connection.channel.watch_end(None)
    connection.channel.close()


def _key(choice: Choice, http2: bool) -> Key:
    route, uid = choice.route, choice.workload.uid
    if isinstance(route, HboneRoute):
        return Key(uid, route.target, True, route.expected, http2)
    return Key(uid, route.target, False, frozenset(), http2)


def _stands(mesh: Snapshot, key: Key) -> bool:
    """Whether the workload is what it was when the connection was made."""
    workload = mesh.workload(key.uid)
    if workload is None or key.target.ip not in workload.addresses:
        return False
    hbone = workload.tunnel_protocol is TunnelProtocol.HBONE
    if key.hbone != hbone or (hbone and key.expected.isdisjoint(workload.identities)):
        return False
    return bool(workload.services)
