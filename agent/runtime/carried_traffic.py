"""What kernel-carried connections add to the metrics and the access log.

The kernel counts per slot, which stands for one pair of label sets: openings,
ends and the bytes of closed connections. Reading it is reading memory. What
live connections have carried so far is asked of the sockets, every few
seconds. Each connection that ends leaves a record for the access log, as many
as the agent has granted; those beyond are counted as dropped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from meshbpf.agent.core.address import IPAddress
from meshbpf.agent.core.service import Service
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.traffic import Labels, Reporter, inbound_service, labels
from meshbpf.agent.core.workload import Workload
from meshbpf.agent.datapath.flowcodecs import Flow, FlowRecord, FlowState, SlotCounters
from meshbpf.agent.datapath.sockdiag import SocketBytes
from meshbpf.agent.runtime import access_log
from meshbpf.agent.runtime.traffic_metrics import Carried, TrafficMetrics
from meshbpf.bpf import MAX_SLOTS

IDLE_S: Final = 120.0
"""After which a slot that nobody uses may be given to others."""
RECORDS_PER_S: Final = 250
_SYN_BYTES: Final = 1
_SOURCE_ONLY: Final = 1  # SLOT_SOURCE_ONLY of the programs


class KernelCounters(Protocol):
    """The part of FlowMaps that is used here."""

    def counters(self, slot: int) -> SlotCounters:
        """Totals of a slot."""

    def zero(self, slot: int) -> None:
        """Begin a slot anew."""

    def records(self, most: int) -> Sequence[FlowRecord]:
        """Connections that have ended."""

    def grant_records(self, count: int) -> int:
        """Let so many be queued; how many were dropped."""


@dataclass(slots=True, eq=False)
class _Slot:
    number: int
    reporters: tuple[tuple[Reporter, Labels], ...]
    source: Workload | None
    destination: Workload
    service: str
    """By which it was dialed; "" for an address."""
    used_at: float
    told: dict[int, SlotCounters] = field(default_factory=dict)
    """What the metrics have, by the kernel's number: of both halves."""
    adopted: int = 0
    """Connections that were opened before this agent: they close here, and never opened."""


class CarriedTraffic:
    """Owns the slots. Used from the event loop."""

    def __init__(
        self,
        kernel: KernelCounters,
        metrics: TrafficMetrics,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._kernel = kernel
        self._metrics = metrics
        self._clock = clock
        self._wall_clock = wall_clock
        self._slots: dict[tuple[Labels, ...], _Slot] = {}
        self._by_number: dict[int, _Slot] = {}
        self._free = list(range(MAX_SLOTS - 2, 0, -2))  # 0 is where the unjudged count
        self.records_dropped = 0
        """Records for which there was no room, while anybody wanted them."""

    def slot(
        self,
        mesh: Snapshot,
        source: Workload | None,
        source_ip: IPAddress,
        destination: Workload,
        port: int,
        dialed: Service | None = None,
    ) -> int | None:
        """Where connections of this kind count; None when all slots are taken.

        `source` is None for plaintext: who it may be says its address. `dialed` is
        the service by which the source came here; `port` always the endpoint's.
        """
        attested = source is not None
        known = source if attested else mesh.workload_at(destination.network, source_ip)
        service = inbound_service(mesh, destination, port, None, dialed)

        def told(reporter: Reporter) -> tuple[Reporter, Labels]:
            return reporter, labels(
                reporter,
                source=known,
                described=None,
                source_identity=source.identity if source is not None else None,
                destination=destination,
                # By an address the source's agent knows of no service.
                service=service if reporter is Reporter.DESTINATION else dialed,
                mutual_tls=False,
            )

        both = (Reporter.SOURCE, Reporter.DESTINATION) if attested else (Reporter.DESTINATION,)
        reporters = tuple(map(told, both))
        key = tuple(found for _, found in reporters)
        slot = self._slots.get(key)
        if slot is None:
            if not self._free:
                return None
            number = self._free.pop()
            for half in (number, number | _SOURCE_ONLY):
                self._kernel.zero(half)
            name = "" if dialed is None else str(dialed.key)
            slot = _Slot(number, reporters, known, destination, name, self._clock())
            self._slots[key] = self._by_number[number] = slot
        slot.used_at = self._clock()
        return slot.number

    def service(self, slot: int) -> str:
        """The service by which connections of a slot were dialed, or ""."""
        found = self._by_number.get(slot & ~_SOURCE_ONLY)
        return "" if found is None else found.service

    def adopted(self, slot: int) -> None:
        """A connection that an earlier agent counted as opened is this slot's from now on."""
        self._by_number[slot].adopted += 1

    # --- metrics ------------------------------------------------------------------

    def fold(
        self,
        live: Iterable[tuple[Flow, FlowState]],
        sampled: Mapping[int, SocketBytes],
    ) -> None:
        """Bring the metrics up to date, with what the sockets of live flows have carried.

        Connections that closed since they were sampled are in the kernel's
        totals already or will be next time: a total never goes back.
        """
        carried: dict[int, list[int]] = {}
        for _, state in live:
            found = sampled.get(state.socket_cookie)
            if found is not None and state.open:
                total = carried.setdefault(state.slot, [0, 0])
                sent, received = directions(state, found)
                total[0] += sent
                total[1] += received
        for slot in self._by_number.values():
            for half in (slot.number, slot.number | _SOURCE_ONLY):
                self._fold(slot, half, carried.get(half, [0, 0]))

    def _fold(self, slot: _Slot, number: int, live: Sequence[int]) -> None:
        now, before = self._kernel.counters(number), slot.told.get(number, SlotCounters())
        after = SlotCounters(
            now.opened,
            now.closed,
            now.failed,
            max(before.sent, now.sent + live[0]),
            max(before.received, now.received + live[1]),
        )
        if after == before:
            return
        slot.used_at = self._clock()
        slot.told[number] = after
        added = Carried(
            opened=after.opened - before.opened,
            closed=after.closed - before.closed,
            failed=after.failed - before.failed,
            sent=after.sent - before.sent,
            received=after.received - before.received,
        )
        for reporter, found in slot.reporters:
            if number & _SOURCE_ONLY and reporter is Reporter.DESTINATION:
                continue
            self._metrics.carried(found, added)

    def idle_slots(self) -> set[int]:
        """Slots that nothing has used for IDLE_S and no live connection counts in."""
        before = self._clock() - IDLE_S
        return {slot.number for slot in self._by_number.values() if self._is_idle(slot, before)}

    def _is_idle(self, slot: _Slot, before: float) -> bool:
        if slot.used_at > before:
            return False
        halves = [self._kernel.counters(slot.number | half) for half in (0, _SOURCE_ONLY)]
        opened = sum(half.opened for half in halves) + slot.adopted
        return opened <= sum(half.closed for half in halves)

    def release(self, numbers: Iterable[int]) -> None:
        """Give slots back; no verdict names them any more, and they were idle twice."""
        for number in numbers:
            slot = self._by_number.pop(number)
            del self._slots[tuple(found for _, found in slot.reporters)]
            self._free.append(number)

    # --- access log ---------------------------------------------------------------

    def log_ended(self, seconds: float) -> int:
        """Write what has ended to the access log, and grant as much for the next `seconds`."""
        wanted = access_log.wants_complete()
        room = int(RECORDS_PER_S * seconds)
        written = 0
        for record in self._kernel.records(room):
            slot = self._by_number.get(record.slot & ~_SOURCE_ONLY)
            if slot is None or not wanted:
                continue
            for reporter, found in slot.reporters:
                if record.slot & _SOURCE_ONLY and reporter is Reporter.DESTINATION:
                    continue
                access_log.carried(record, reporter, found, slot.source, slot.destination)
                written += 1
        dropped = self._kernel.grant_records(room if wanted else 0)
        if wanted:
            self.records_dropped += dropped
        return written


def directions(state: FlowState, found: SocketBytes) -> tuple[int, int]:
    """Bytes from source to destination, and back."""
    if state.source:
        return max(0, found.acked - _SYN_BYTES), found.received
    return found.received, found.acked
