"""Kernel-carried flows in the maps, as bytes; bpf/include/meshbpf/keys.h is the other side."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from meshbpf.agent.core.address import SocketAddress
from meshbpf.agent.datapath.codecs import IPAddress, address, read_address
from meshbpf.bpf import MAX_CHOICES, Report

_FLOW: Final = struct.Struct("=16s16s2s2s")
_KEY: Final = struct.Struct("=II16s16sI")
_VERDICT: Final = struct.Struct("=QQII")
_STATE: Final = struct.Struct("=QQQQIIIIIBBBBB7x")
_SLOT: Final = struct.Struct("=5Q")
_RECORD: Final = struct.Struct("=36sIQQQQII")
_REPORT: Final = struct.Struct("=36sIQII")
_SLOT_AT: Final = 40  # of struct flow_state
_SERVICE: Final = struct.Struct("=II16s")
_CHOICES: Final = struct.Struct("=QII")
_CHOICE: Final = struct.Struct("=IIII16s")


@dataclass(frozen=True, slots=True)
class Flow:
    """One TCP connection, as its client sees it."""

    source: SocketAddress
    destination: SocketAddress


@dataclass(frozen=True, slots=True)
class VerdictKey:
    """All that policy can read of a connection. `source` is 0 for plaintext."""

    source: int
    destination: int
    source_ip: IPAddress
    destination_ip: IPAddress
    port: int


@dataclass(frozen=True, slots=True)
class ServiceKey:
    """An address and port of a service, as one pod dials it."""

    pod: int
    ip: IPAddress
    port: int


@dataclass(frozen=True, slots=True)
class ServiceChoice:
    """An endpoint that the kernel may carry to; `slot` counts connections made by the service."""

    target: SocketAddress
    weight: int
    slot: int


@dataclass(frozen=True, slots=True)
class FlowState:
    """What the kernel keeps of a flow that it carries."""

    source_cookie: int
    socket_cookie: int
    opened_ns: int
    source: int
    """Index of the attested pod; 0 for plaintext."""
    destination: int
    slot: int
    attested: bool
    """Its SYN passed the host ends of both pods."""
    carried: bool
    """The destination's sk_lookup gave it to the app; else the agent there has it."""
    open: bool

    @property
    def watched_in(self) -> int:
        """The pod in whose netns the socket is that we watch."""
        return self.source or self.destination


@dataclass(frozen=True, slots=True)
class SlotCounters:
    """Totals of one slot since it was zeroed. Bytes are those of closed connections."""

    opened: int = 0
    closed: int = 0
    failed: int = 0
    sent: int = 0
    received: int = 0


@dataclass(frozen=True, slots=True)
class FlowRecord:
    """A connection that has ended. Times are CLOCK_MONOTONIC."""

    flow: Flow
    slot: int
    opened_ns: int
    closed_ns: int
    sent: int
    received: int
    failed: bool


@dataclass(frozen=True, slots=True)
class FlowReport:
    """A connection that was established without a verdict that holds."""

    flow: Flow
    reason: Report
    socket_cookie: int
    source: int
    destination: int

    @property
    def watched_in(self) -> int:
        """As FlowState's."""
        return self.source or self.destination


def flow(one: Flow) -> bytes:
    """Key of `flows`."""
    return _FLOW.pack(
        address(one.source.ip),
        address(one.destination.ip),
        one.source.port.to_bytes(2, "big"),
        one.destination.port.to_bytes(2, "big"),
    )


def read_flow(raw: bytes) -> Flow:
    """The reverse of `flow`."""
    source, destination, source_port, destination_port = _FLOW.unpack(raw)
    return Flow(
        SocketAddress(read_address(source), int.from_bytes(source_port, "big")),
        SocketAddress(read_address(destination), int.from_bytes(destination_port, "big")),
    )


def verdict_key(key: VerdictKey) -> bytes:
    """Key of `verdicts`."""
    return _KEY.pack(
        key.source, key.destination, address(key.source_ip), address(key.destination_ip), key.port
    )


def verdict(source_epoch: int, destination_epoch: int, slot: int) -> bytes:
    """Value of `verdicts`."""
    return _VERDICT.pack(source_epoch, destination_epoch, slot, 0)


def service_key(key: ServiceKey) -> bytes:
    """Key of `services`."""
    return _SERVICE.pack(key.pod, key.port, address(key.ip))


def service_choices(epoch: int, total: int, choices: Sequence[ServiceChoice]) -> bytes:
    """Value of `services`; at most MAX_CHOICES, whose weights are part of `total`."""
    if len(choices) > MAX_CHOICES:
        raise ValueError(f"{len(choices)} choices; the kernel's map takes {MAX_CHOICES}")
    packed = [_CHOICES.pack(epoch, total, len(choices))]
    below = 0
    for each in choices:
        below += each.weight
        target = each.target
        packed.append(_CHOICE.pack(below, target.port, each.slot, 0, address(target.ip)))
    return b"".join(packed).ljust(_CHOICES.size + MAX_CHOICES * _CHOICE.size, b"\0")


def read_state(raw: bytes) -> FlowState:
    """Value of `flows`."""
    (
        source_cookie, socket_cookie, opened_ns, _at_fin, source, destination, slot,
        _client_isn, _server_isn, sent, came, _answered, carried, is_open,
    ) = _STATE.unpack(raw)  # fmt: skip
    return FlowState(
        source_cookie, socket_cookie, opened_ns, source, destination, slot,
        bool(source and sent and came), bool(carried), bool(is_open),
    )  # fmt: skip


def with_slot(raw: bytes, slot: int) -> bytes:
    """The value of `flows` with another slot."""
    return raw[:_SLOT_AT] + struct.pack("=I", slot) + raw[_SLOT_AT + 4 :]


def read_slot(raw: bytes) -> SlotCounters:
    """An element of `flow_slots`."""
    return SlotCounters(*_SLOT.unpack(raw))


def read_record(raw: bytes) -> FlowRecord:
    """An element of `flow_records`."""
    key, slot, opened_ns, closed_ns, sent, received, failed, _ = _RECORD.unpack(raw)
    return FlowRecord(read_flow(key), slot, opened_ns, closed_ns, sent, received, bool(failed))


def read_report(raw: bytes) -> FlowReport:
    """An element of `flow_reports`."""
    key, reason, socket_cookie, source, destination = _REPORT.unpack(raw)
    return FlowReport(read_flow(key), Report(reason), socket_cookie, source, destination)
