"""The outbound tunnels of one pod, shared by its connections.

A tunnel may be shared only by connections that the far side may take for one
another: it sees the tunnel's source address and identity as the caller's. So
the key holds both, besides where the tunnel leads and who may answer there.

One dial at a time runs for each key; who comes meanwhile waits for its
outcome. A tunnel that has as many streams as it may leaves the pool for good
and ends with its last stream; so does one after GOAWAY, and one that was idle
for `tunnel_idle_s`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from meshbpf.agent.core.address import IPAddress, SocketAddress
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.tuning import ZTUNNELS
from meshbpf.agent.runtime.sockets import DialError
from meshbpf.agent.runtime.stream import TunnelStream
from meshbpf.agent.runtime.tunnel import Early, Tunnel
from meshbpf.agent.wire.events import Headers

Dial = Callable[[Callable[["Tunnel"], None]], Awaitable["Tunnel"]]


@dataclass(frozen=True, slots=True)
class PoolKey:
    """What two connections must have in common to share a tunnel."""

    source_identity: SpiffeId
    allowed: frozenset[SpiffeId]
    gateway: SocketAddress
    source: IPAddress


@dataclass(slots=True, eq=False)
class _Entry:
    dialing: trio.Lock = field(default_factory=trio.Lock)
    tunnel: Tunnel | None = None
    waiting: int = 0
    failures: int = 0
    failure: MeshbpfError | None = None


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """The pool at one moment, and its totals."""

    tunnels: int
    streams: int
    dialed: int
    reused: int


class TunnelPool:
    """See above. All of a pod's connections use one."""

    def __init__(self, most_streams: int = ZTUNNELS.tunnel_streams) -> None:
        self._most_streams = most_streams
        self._entries: dict[PoolKey, _Entry] = {}
        self._dialed = 0
        self._reused = 0

    async def open(
        self,
        key: PoolKey,
        dial: Dial,
        headers: Headers,
        early: Early | None = None,
    ) -> TunnelStream:
        """A new stream on a pooled tunnel, or on one that `dial` makes.

        `headers` and `early` as of Tunnel.open. `dial` is given what to call once
        the tunnel takes no more streams. Its error reaches the connection that
        dialed and those that waited for it.
        """
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry()
        if entry.tunnel is not None and entry.tunnel.usable:
            return self._reuse(key, entry.tunnel, headers, early)
        arrived = entry.failures
        entry.waiting += 1
        try:
            async with entry.dialing:
                # No switch between these checks and the stream's opening,
                # else the last free stream could be taken twice.
                if entry.tunnel is not None and entry.tunnel.usable:
                    return self._reuse(key, entry.tunnel, headers, early)
                if entry.failure is not None and entry.failures > arrived:
                    # The dial that we waited for failed: so would ours, after
                    # another ten seconds, and so on down the queue.
                    failure = entry.failure
                    raise DialError(failure.code, failure.what, failure.hint)
                tunnel = await self._dial(key, entry, dial)
                return self._open_on(key, tunnel, headers, early)
        finally:
            entry.waiting -= 1
            self._tidy(key, entry)

    async def _dial(self, key: PoolKey, entry: _Entry, dial: Dial) -> Tunnel:
        try:
            tunnel = await dial(lambda gone: self._forget(key, gone))
        except MeshbpfError as error:
            entry.failures += 1
            entry.failure = error
            raise
        self._dialed += 1
        tunnel.pooled = True
        entry.tunnel = tunnel
        return tunnel

    def drain(self) -> None:
        """Hand out no stream of the tunnels there are: each ends with its last."""
        for tunnel in [each.tunnel for each in self._entries.values() if each.tunnel is not None]:
            tunnel.drain()

    def statistics(self) -> PoolStatistics:
        """For `status`."""
        tunnels = [each.tunnel for each in self._entries.values() if each.tunnel is not None]
        return PoolStatistics(
            tunnels=len(tunnels),
            streams=sum(each.stream_count for each in tunnels),
            dialed=self._dialed,
            reused=self._reused,
        )

    def _reuse(
        self, key: PoolKey, tunnel: Tunnel, headers: Headers, early: Early | None
    ) -> TunnelStream:
        self._reused += 1
        return self._open_on(key, tunnel, headers, early)

    def _open_on(
        self, key: PoolKey, tunnel: Tunnel, headers: Headers, early: Early | None
    ) -> TunnelStream:
        stream = tunnel.open(headers, early)
        if tunnel.stream_count >= min(self._most_streams, tunnel.max_streams):
            self._forget(key, tunnel)
            tunnel.pooled = False
        return stream

    def _forget(self, key: PoolKey, tunnel: Tunnel) -> None:
        entry = self._entries.get(key)
        if entry is not None and entry.tunnel is tunnel:
            entry.tunnel = None
            self._tidy(key, entry)

    def _tidy(self, key: PoolKey, entry: _Entry) -> None:
        """Keep no entry without a tunnel: source ports come and go, keys must not pile up."""
        if entry.tunnel is None and entry.waiting == 0 and self._entries.get(key) is entry:
            del self._entries[key]
