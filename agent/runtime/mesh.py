"""The mesh state in force, and the order in which a new one takes effect.

A new state reaches the kernel first and the forwarder second: a destination
that joins the mesh is captured before anything routes to it, while one that
leaves is simply no longer handed over. Then live connections are judged
again. Each state is applied whole, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from meshbpf.agent.core.address import IPNetwork
from meshbpf.agent.core.state import MeshState
from meshbpf.agent.core.steering import mesh_prefixes
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.runtime.logs import Log

log = Log("mesh")


class LiveMesh:
    """Holds the snapshot that every decision reads."""

    def __init__(self, datapath_lock: trio.Lock) -> None:
        self._datapath_lock = datapath_lock
        self._set_prefixes: Callable[[frozenset[IPNetwork]], None] | None = None
        self._listeners: list[Callable[[Snapshot], None]] = []
        self._version = 0
        self.snapshot = Snapshot.EMPTY

    def current(self) -> Snapshot:
        """The snapshot in force, for those who ask on every connection."""
        return self.snapshot

    def on_change(self, listener: Callable[[Snapshot], None]) -> None:
        """Call `listener` with each new snapshot, once it is in force."""
        self._listeners.append(listener)

    def steer_with(self, set_prefixes: Callable[[frozenset[IPNetwork]], None]) -> None:
        """Where the kernel's list of destinations is set (a blocking call)."""
        self._set_prefixes = set_prefixes

    async def apply(self, state: MeshState) -> None:
        """Make `state` the one in force. Raises MeshbpfError, and then the old one stays."""
        version = self._version + 1
        snapshot = await trio.to_thread.run_sync(Snapshot.of, state, version)
        if self._set_prefixes is not None:
            prefixes = await trio.to_thread.run_sync(mesh_prefixes, snapshot)
            async with self._datapath_lock:
                await trio.to_thread.run_sync(self._set_prefixes, prefixes)
        self._version = version
        self.snapshot = snapshot
        for listener in self._listeners:
            listener(snapshot)
