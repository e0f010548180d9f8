"""The mesh state in force, and the order in which a new one takes effect.

A new state reaches the kernel first and the forwarder second: a destination
that joins the mesh is captured before anything routes to it, while one that
leaves is simply no longer handed over. Then live connections are judged
again. Each change is applied whole, one at a time, at a cost that follows the
change and not the mesh.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Protocol

import trio

from meshbpf.agent.core.address import PackedPrefix
from meshbpf.agent.core.state import MeshDelta, MeshState
from meshbpf.agent.core.steering import MeshPrefixes, PrefixChange
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.store_delta import delta_to
from meshbpf.agent.runtime import heap

SMALL_RECORDS = 16
"""So many are put in their places in less than a millisecond, however large the mesh."""

Follower = Callable[[Snapshot, Snapshot, MeshDelta], None]


class Destinations(Protocol):
    """Where the kernel's list of destinations is kept; both calls block."""

    def replace_mesh(self, prefixes: Iterable[PackedPrefix]) -> None:
        """Make these all there are."""
        ...

    def change_mesh(
        self, added: Collection[PackedPrefix], removed: Collection[PackedPrefix]
    ) -> None:
        """Change those that are there."""
        ...


class LiveMesh:
    """Holds the snapshot that every decision reads; the one writer of mesh state."""

    def __init__(self, datapath_lock: trio.Lock, *, require_waypoint: bool = False) -> None:
        self._datapath_lock = datapath_lock
        self._writing = trio.Lock()
        self._kernel: Destinations | None = None
        self._kernel_follows = False
        self._prefixes = MeshPrefixes()
        self._listeners: list[Callable[[Snapshot], None]] = []
        self._settlers: list[Callable[[], Awaitable[object]]] = []
        self._followers: list[Follower] = []
        self.snapshot = Snapshot.empty(require_waypoint=require_waypoint)

    def current(self) -> Snapshot:
        """The snapshot in force, for those who ask on every connection."""
        return self.snapshot

    def on_change(self, listener: Callable[[Snapshot], None]) -> None:
        """Call `listener` with each new snapshot, once it is in force."""
        self._listeners.append(listener)

    def settle_with(self, settle: Callable[[], Awaitable[object]]) -> None:
        """Await `settle` before a new state counts as applied."""
        self._settlers.append(settle)

    def on_delta(self, follower: Follower) -> None:
        """Call `follower` with (before, after, delta), once it is in force."""
        self._followers.append(follower)

    def steer_with(self, kernel: Destinations) -> None:
        """Where the kernel's list of destinations is set.

        The first state replaces what the kernel has, for an earlier agent may
        have left it there; until then that stands.
        """
        self._kernel = kernel
        self._kernel_follows = False

    def stop_steering(self) -> None:
        """A successor tells the kernel from now on; decisions here go on to follow the state."""
        self._kernel = None

    async def apply(self, state: MeshState) -> None:
        """Make `state` the whole mesh. Raises MeshbpfError, and then the old one stays."""
        async with self._writing:
            delta = await trio.to_thread.run_sync(delta_to, self.snapshot, state)
            await self._apply(delta)

    async def apply_delta(self, delta: MeshDelta) -> None:
        """Change the mesh by `delta`, whole. Raises MeshbpfError, and then nothing has changed.

        Deltas take effect in the order of the calls. Cancelled, the call may
        have taken effect or not; a source that goes on sends the delta again.
        """
        async with self._writing:
            await self._apply(delta)

    async def _apply(self, delta: MeshDelta) -> None:
        old = self.snapshot
        # A thread that computes holds up the event loop by up to sys.getswitchinterval()
        # whenever it wants the interpreter back: what takes less is done here.
        if len(delta) <= SMALL_RECORDS:
            new, change = self._prepare(old, delta)
        else:
            new, change = await trio.to_thread.run_sync(self._prepare, old, delta)
        if self._kernel is not None and not (self._kernel_follows and change.empty):
            async with self._datapath_lock:
                await trio.to_thread.run_sync(self._steer, self._kernel, change)
        self._prefixes.commit(change)
        self.snapshot = new
        # In the same step of the event loop: nobody decides by the new state
        # before those who keep answers of the old one have heard of it.
        for follower in self._followers:
            follower(old, new, delta)
        for listener in self._listeners:
            listener(new)
        for settle in self._settlers:
            await settle()

    def _prepare(self, old: Snapshot, delta: MeshDelta) -> tuple[Snapshot, PrefixChange]:
        with heap.undisturbed(len(delta)):
            new = old.after(delta, old.version + 1)
            change = self._prefixes.change(old, new, delta)
            new.prepare_policies(old)
        return new, change

    def _steer(self, kernel: Destinations | None, change: PrefixChange) -> None:
        if kernel is None:
            return  # a successor's by now
        if self._kernel_follows:
            kernel.change_mesh(change.added, change.removed)
        else:
            wanted = set(self._prefixes).union(change.added).difference(change.removed)
            kernel.replace_mesh(wanted)
            self._kernel_follows = True
