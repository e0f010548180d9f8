"""The maps of kernel-carried flows: verdicts, services, epochs, live flows, counters, queues.

Four of them are memory that we share with the programs: raising an epoch is a
store, which takes effect with the very next packet, and costs the event loop
nothing however many pods a change concerns. Epochs are times of the monotonic
clock and never come back, also when a pod's index goes to another pod.

A verdict is written with the epochs that are in force at that moment. Whoever
decides and then calls `allow` must not let go of the event loop in between:
`raise_epochs` is called in the loop too, in the same step that puts a new mesh
state into force, so a verdict never has an epoch younger than what it was
decided by.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from meshbpf.agent.datapath import bpfsys, codecs, flowcodecs
from meshbpf.agent.datapath.bpfcall import BpfError
from meshbpf.agent.datapath.flowcodecs import (
    Flow,
    FlowRecord,
    FlowReport,
    FlowState,
    ServiceChoice,
    ServiceKey,
    SlotCounters,
    VerdictKey,
)
from meshbpf.agent.datapath.maps import Map
from meshbpf.bpf import MAX_SLOTS

_SLOT_WORDS: Final = 5
# Words of struct flow_quota (keys.h).
_RECORDS, _RECORDS_DROPPED, _REPORTS_LOST = range(3)


class FlowMaps:
    """Used from the event loop; `live` and the queues may be read in a thread as well."""

    def __init__(self, maps: Mapping[str, Map]) -> None:
        self._maps = maps
        self._memory = {
            name: maps[name].mmap()
            for name in ("epochs", "flow_counts", "flow_slots", "flow_quota")
        }
        self._views = {name: memoryview(area).cast("Q") for name, area in self._memory.items()}
        self._epochs = self._views["epochs"]
        self._slots = self._views["flow_slots"]
        self._quota = self._views["flow_quota"]

    def close(self) -> None:
        """Let go of the shared memory. Repeatable."""
        for view in self._views.values():
            view.release()
        for area in self._memory.values():
            area.close()

    # --- verdicts -------------------------------------------------------------

    def raise_epochs(self, pods: Iterable[int]) -> None:
        """No verdict of before holds any more for connections from or to these."""
        now_ns = time.monotonic_ns()
        for pod in pods:
            self._epochs[pod] = max(now_ns, self._epochs[pod] + 1)

    def allow(self, key: VerdictKey, slot: int) -> None:
        """The kernel may carry such connections, until an epoch is raised."""
        source_epoch = self._epochs[key.source] if key.source else 0
        value = flowcodecs.verdict(source_epoch, self._epochs[key.destination], slot)
        self._maps["verdicts"].update(flowcodecs.verdict_key(key), value)

    def forget(self, keys: Iterable[VerdictKey]) -> None:
        """Remove verdicts; those that are not there are passed over."""
        self._maps["verdicts"].delete_many(map(flowcodecs.verdict_key, keys))

    def forget_all(self) -> None:
        """Remove every verdict and every service's choices, whoever wrote them."""
        for name in ("services", "verdicts"):
            found = self._maps[name]
            found.delete_many(list(found.keys()))

    def epoch(self, pod: int) -> int:
        """The pod's epoch that is in force."""
        return self._epochs[pod]

    # --- services -------------------------------------------------------------

    def offer(self, key: ServiceKey, total: int, choices: Sequence[ServiceChoice]) -> None:
        """The connect hook may draw among these, until the dialing pod's epoch is raised.

        As with `allow`: no step of the event loop between the decision and this.
        """
        value = flowcodecs.service_choices(self._epochs[key.pod], total, choices)
        self._maps["services"].update(flowcodecs.service_key(key), value)

    def withdraw(self, keys: Iterable[ServiceKey]) -> None:
        """The agent picks again; services that are not there are passed over."""
        self._maps["services"].delete_many(map(flowcodecs.service_key, keys))

    def take_drawn(self, flow: Flow) -> bool:
        """Whether the connect hook has drawn for this connection, and left it to the agent."""
        return self._maps["drawn"].delete(flowcodecs.flow(flow))

    # --- live flows -----------------------------------------------------------

    def state(self, flow: Flow) -> FlowState | None:
        """What the kernel keeps of this connection, if it is one that it carries."""
        raw = self._maps["flows"].lookup(flowcodecs.flow(flow))
        return None if raw is None else flowcodecs.read_state(raw)

    def live(self) -> list[tuple[Flow, FlowState]]:
        """Every flow that the kernel carries, or is about to."""
        return [
            (flowcodecs.read_flow(key), flowcodecs.read_state(raw))
            for key, raw in self._maps["flows"].items_in_batches()
        ]

    def move_slot(self, flow: Flow, slot: int) -> None:
        """Count the rest of an established flow elsewhere."""
        flows, key = self._maps["flows"], flowcodecs.flow(flow)
        raw = flows.lookup(key)
        if raw is not None:
            flows.update(key, flowcodecs.with_slot(raw, slot))

    def drop(self, flow: Flow, owner: int) -> None:
        """Forget a flow whose end no program saw."""
        if self._maps["flows"].delete(flowcodecs.flow(flow)):
            counts = self._views["flow_counts"]
            # Not atomic against the programs' counting: `recount` mends it.
            counts[owner] = max(0, counts[owner] - 1)

    def recount(self, owners: Mapping[int, int]) -> None:
        """Correct the number of flows that each pod has, as the limit sees it."""
        counts = self._views["flow_counts"]
        for pod, count in owners.items():
            counts[pod] = count

    # --- counters ---------------------------------------------------------------

    def counters(self, slot: int) -> SlotCounters:
        """Totals of a slot."""
        start = slot * _SLOT_WORDS
        return SlotCounters(*self._slots[start : start + _SLOT_WORDS])

    def zero(self, slot: int) -> None:
        """Begin a slot anew."""
        start = slot * _SLOT_WORDS
        for word in range(start, start + _SLOT_WORDS):
            self._slots[word] = 0

    def zero_all(self) -> None:
        """Begin all slots anew: an earlier agent's mean nothing to this one."""
        for slot in range(MAX_SLOTS):
            self.zero(slot)

    # --- queues -----------------------------------------------------------------

    def records(self, most: int) -> list[FlowRecord]:
        """Up to `most` connections that have ended, oldest first."""
        return [flowcodecs.read_record(raw) for raw in self._popped("flow_records", most)]

    def grant_records(self, count: int) -> int:
        """Let `count` records be queued from now on; how many were dropped since the last time."""
        dropped = self._quota[_RECORDS_DROPPED]
        self._quota[_RECORDS_DROPPED] = 0
        self._quota[_RECORDS] = count
        return dropped

    def reports(self) -> list[FlowReport]:
        """What was established in doubt since the last time."""
        room = self._maps["flow_reports"].spec.max_entries
        return [flowcodecs.read_report(raw) for raw in self._popped("flow_reports", room)]

    def take_lost_reports(self) -> int:
        """Reports for which there was no room; then every flow must be looked at."""
        lost = self._quota[_REPORTS_LOST]
        if lost:
            self._quota[_REPORTS_LOST] = 0
        return lost

    def _popped(self, name: str, most: int) -> Iterator[bytes]:
        queue = self._maps[name]
        for _ in range(most):
            try:
                raw = bpfsys.map_pop(queue.fileno(), queue.spec.value_size)
            except BpfError as error:
                if error.errno == errno.ENOENT:
                    return
                raise
            yield raw


def raise_epoch(maps: Mapping[str, Map], pod: int) -> None:
    """As FlowMaps.raise_epochs, for whoever attaches or detaches the pod."""
    maps["epochs"].update(codecs.u32(pod), codecs.u64(time.monotonic_ns()))
