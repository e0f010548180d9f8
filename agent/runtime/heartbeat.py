"""The heartbeat that the hooks compare, and the lease of the mesh state.

What the kernel knows: a hook that must hand a connection over looks at the
time of the last beat. Older than the limit (0.5 s) means that the agent is
dead or hangs, and the pod's fail mode decides. A killed or stopped
(SIGSTOP) process falls silent by itself.

What it cannot see is an agent whose event loop is stuck while its threads
run on. So the beat has a thread of its own, which a long step of the loop
does not delay, but beats only while the loop has ticked within LOOP_TURNS of
its own turns (2 s). Turns and not seconds: after SIGCONT both are late by the
same pause, and the first turn of the thread must beat at once.

The lease is a second clock in the same write: how long "this address is not
in the mesh" may be believed. It moves on only while the source of the state
is healthy; with a sick source each beat writes what is left of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.runtime.logs import Log

BEAT_S = 0.1
TICK_S = 0.2
LOOP_TURNS = 20

log = Log("heartbeat")


class Beater(Protocol):
    """The part of Steering that is used here."""

    def beat(self, *, lease_s: float, ahead_s: float = 0.0) -> None:
        """Write a heartbeat of `ahead_s` from now, and a lease that ends in `lease_s`."""


@dataclass(frozen=True, slots=True)
class HeartbeatStatistics:
    """Counters since the start."""

    beats: int
    withheld: int
    """Beats left out because the loop did not tick."""
    failed: int
    loop_lag_s: float


class Heartbeat:
    """Beats from `start()` to `stop()`; `tick()` runs in the event loop meanwhile."""

    def __init__(
        self,
        steering: Beater,
        *,
        lease_s: float,
        source_healthy: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._steering = steering
        self._lease_s = lease_s
        self._source_healthy = source_healthy
        self._clock = clock
        self._ticked_at = self._lease_from = clock()
        self._ticks = self._ticks_seen = self._idle_turns = 0
        self._beats = self._withheld = self._failed = 0
        self._beating = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="meshbpf-heartbeat", daemon=True)

    @property
    def beating(self) -> bool:
        """Whether the last beat was written."""
        return self._beating

    def start(self) -> None:
        """Beat from now on. Call it when every listener is in its place, not before."""
        self.tick_once()
        self.beat_once()
        self._thread.start()

    def stop(self) -> None:
        """No beat comes after this returns."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        self._beating = False

    def bequeath(self, grace_s: float) -> None:
        """Stop with a beat that is good for `grace_s`: a successor takes the listeners over.

        Raises MeshbpfError when it cannot be written; it is stopped all the same.
        """
        self.stop()
        left_s = self._lease_from + self._lease_s - self._clock()
        self._steering.beat(lease_s=max(0.0, left_s), ahead_s=grace_s)

    def renounce(self, limit_s: float) -> None:
        """Stop with a beat that is too old already: the pods' fail mode applies at once.

        Otherwise the kernel would hand over for another `limit_s`. Raises
        MeshbpfError when it cannot be written; it is stopped all the same.
        """
        self.stop()
        left_s = self._lease_from + self._lease_s - self._clock()
        self._steering.beat(lease_s=max(0.0, left_s), ahead_s=-2 * limit_s)

    async def tick(self) -> None:
        """Tell the thread that the loop turns, until cancelled."""
        while True:
            self.tick_once()
            await trio.sleep(TICK_S)

    def tick_once(self) -> None:
        """The loop turns."""
        self._ticked_at = self._clock()
        self._ticks += 1

    def beat_once(self) -> None:
        """One turn of the thread: beat, or withhold it. Never raises for the kernel's sake."""
        now = self._clock()
        if self._ticks != self._ticks_seen:
            self._ticks_seen, self._idle_turns = self._ticks, 0
        else:
            self._idle_turns += 1
        if self._idle_turns > LOOP_TURNS:
            self._withheld += 1
            if self._beating:
                log.error("event loop is stuck: heartbeat withheld", lag_s=self._lag(now))
            self._beating = False
            return
        if self._source_healthy():
            self._lease_from = now
        try:
            self._steering.beat(lease_s=max(0.0, self._lease_from + self._lease_s - now))
        except MeshbpfError as error:
            self._failed += 1
            if self._beating or self._failed == 1:
                log.error("heartbeat cannot be written", cause=error)
            self._beating = False
            return
        if not self._beating and self._beats:
            log.info("heartbeat resumed")
        self._beats += 1
        self._beating = True

    def statistics(self) -> HeartbeatStatistics:
        """Counters since the start."""
        return HeartbeatStatistics(
            self._beats, self._withheld, self._failed, self._lag(self._clock())
        )

    def _lag(self, now: float) -> float:
        return round(max(0.0, now - self._ticked_at), 3)

    def _run(self) -> None:
        while not self._stopped.wait(BEAT_S):
            try:
                self.beat_once()
            except Exception as error:  # noqa: BLE001
                # A dead thread would be an agent declared dead by the kernel
                # while it serves: whatever it is, say so and beat again.
                self._beating = False
                self._failed += 1
                log.error("heartbeat failed", cause=error)
