"""When the heart beats, and what the lease then is."""

from __future__ import annotations

import time

import trio
from trio.testing import MockClock

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.runtime.heartbeat import LOOP_TURNS, Heartbeat


class Kernel:
    """Takes the beats and notes the lease of each."""

    def __init__(self) -> None:
        self.leases: list[float] = []
        self.ahead_s = 0.0
        self.broken = False

    def beat(self, *, lease_s: float, ahead_s: float = 0.0) -> None:
        if self.broken:
            raise MeshbpfError("bpf", "no map")
        self.leases.append(lease_s)
        self.ahead_s = ahead_s


class Fixture:
    """A heartbeat at a clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0
        self.healthy = True
        self.kernel = Kernel()
        self.heartbeat = Heartbeat(
            self.kernel,
            lease_s=60.0,
            source_healthy=lambda: self.healthy,
            clock=lambda: self.now,
        )


def test_a_beat_extends_the_lease_while_the_source_is_healthy() -> None:
    it = Fixture()
    for _ in range(3):
        it.heartbeat.beat_once()
        it.now += 1.0
    assert it.kernel.leases == [60.0, 60.0, 60.0]
    assert it.heartbeat.beating


def test_a_successor_gets_a_beat_dated_ahead_and_what_is_left_of_the_lease() -> None:
    it = Fixture()
    it.heartbeat.beat_once()
    assert it.kernel.ahead_s == 0.0
    it.now += 20.0
    it.heartbeat.bequeath(10.0)
    assert it.kernel.leases == [60.0, 40.0]
    assert it.kernel.ahead_s == 10.0
    assert not it.heartbeat.beating


def test_whoever_renounces_is_dead_to_the_kernel_at_once() -> None:
    it = Fixture()
    it.heartbeat.beat_once()
    it.heartbeat.renounce(0.5)
    assert it.kernel.ahead_s < -0.5
    assert it.kernel.leases == [60.0, 60.0], "what is outside the mesh is believed on"
    assert not it.heartbeat.beating


def test_with_a_sick_source_the_lease_runs_out_and_never_below_zero() -> None:
    it = Fixture()
    it.heartbeat.beat_once()
    it.healthy = False
    for passed in (10.0, 40.0, 20.0):
        it.now += passed
        it.heartbeat.tick_once()
        it.heartbeat.beat_once()
    assert it.kernel.leases == [60.0, 50.0, 10.0, 0.0]
    it.healthy = True
    it.heartbeat.beat_once()
    assert it.kernel.leases[-1] == 60.0


def test_a_loop_that_does_not_turn_silences_the_heart() -> None:
    it = Fixture()
    it.heartbeat.tick_once()
    for _ in range(LOOP_TURNS + 1):
        it.heartbeat.beat_once()
    assert it.heartbeat.beating
    it.heartbeat.beat_once()
    assert len(it.kernel.leases) == LOOP_TURNS + 1
    assert not it.heartbeat.beating
    assert it.heartbeat.statistics().withheld == 1
    it.heartbeat.tick_once()
    it.heartbeat.beat_once()
    assert it.heartbeat.beating


def test_after_a_pause_of_the_whole_process_the_first_turn_beats() -> None:
    it = Fixture()
    it.heartbeat.tick_once()
    it.heartbeat.beat_once()
    it.now += 3600.0  # SIGSTOP, SIGCONT: neither the thread nor the loop had a turn
    it.heartbeat.beat_once()
    assert len(it.kernel.leases) == 2


def test_a_failed_write_is_counted_and_tried_again() -> None:
    it = Fixture()
    it.kernel.broken = True
    it.heartbeat.beat_once()
    assert not it.heartbeat.beating
    assert it.heartbeat.statistics().failed == 1
    it.kernel.broken = False
    it.heartbeat.beat_once()
    assert it.heartbeat.beating


def test_the_thread_beats_several_times_within_the_limit_and_not_after_stop() -> None:
    kernel = Kernel()
    heartbeat = Heartbeat(kernel, lease_s=60.0, source_healthy=lambda: True)
    heartbeat.start()
    assert len(kernel.leases) == 1  # at once, not after the first pause
    time.sleep(0.5)
    heartbeat.stop()
    beats = len(kernel.leases)
    assert beats >= 3
    time.sleep(0.25)
    assert len(kernel.leases) == beats
    assert not heartbeat.beating


async def test_the_tick_keeps_the_lag_small(autojump_clock: MockClock) -> None:
    heartbeat = Heartbeat(
        Kernel(), lease_s=60.0, source_healthy=lambda: True, clock=trio.current_time
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(heartbeat.tick)
        await trio.sleep(30.05)
        assert heartbeat.statistics().loop_lag_s < 0.3
        nursery.cancel_scope.cancel()
