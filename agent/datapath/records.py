"""What must be known to take an attachment over, or to undo it, after a crash.

A record lives in a pinned map, beside what it describes: it survives the
agent exactly as long as the capture does, and it cannot be there without it
or the other way round, as a file could. It is written before the first change
and says `attaching` until the last one is done; an agent that finds such a
record undoes it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from enum import StrEnum
from ipaddress import ip_address, ip_network
from pathlib import Path

import msgspec

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.datapath import codecs
from meshbpf.agent.datapath.codecs import IPAddress, IPNetwork
from meshbpf.agent.datapath.maps import Map
from meshbpf.agent.datapath.plumbing import Sysctl
from meshbpf.bpf import MAX_PODS


class Phase(StrEnum):
    """How far an attachment is."""

    ATTACHING = "attaching"
    ATTACHED = "attached"
    DETACHING = "detaching"


class TcPoint(msgspec.Struct, frozen=True):
    """A TC hook that holds one of our programs."""

    program: str
    ifindex: int
    interface: str
    egress: bool
    on_host: bool  # in the agent's netns, not in the pod's
    clsact: bool  # a classic filter; else a tcx link
    our_qdisc: bool  # there was no clsact qdisc before us


class PodRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One attachment, as stored."""

    index: int
    key: str
    phase: Phase
    netns: str
    netns_dev: int
    netns_inode: int
    cookie: int
    flags: int
    addresses: tuple[str, ...]
    own_addresses: tuple[str, ...]
    families: tuple[int, ...]
    points: tuple[TcPoint, ...]
    host_skipped: tuple[str, ...]
    sysctls: tuple[Sysctl, ...]
    exempt_ports: tuple[int, ...]
    exempt_cidrs: tuple[str, ...]
    exempt_ifindexes: tuple[int, ...]

    def ips(self) -> tuple[IPAddress, ...]:
        """The pod's global addresses."""
        return tuple(map(ip_address, self.addresses))

    def own_ips(self) -> tuple[IPAddress, ...]:
        """Every address in the pod, link-local ones too."""
        return tuple(map(ip_address, self.own_addresses))

    def cidrs(self) -> tuple[IPNetwork, ...]:
        """Exempt networks."""
        return tuple(map(ip_network, self.exempt_cidrs))

    def netns_path(self) -> Path:
        """Where the netns was when it was attached."""
        return Path(self.netns)


class Records:
    """The map `records`, read once: this agent alone writes it."""

    def __init__(self, stored: Map) -> None:
        self._map = stored
        self._known = {record.index: record for record in _decoded(stored)}

    def put(self, record: PodRecord) -> None:
        """Store; MeshbpfError when it does not fit."""
        raw = msgspec.json.encode(record)
        room = self._map.spec.value_size
        if len(raw) > room:
            raise MeshbpfError(
                "record-too-large",
                f"{record.key}: more interfaces, addresses and exemptions than can be kept",
                f"the record takes {len(raw)} bytes of {room}",
            )
        self._map.update(codecs.u32(record.index), raw.ljust(room, b"\0"))
        self._known[record.index] = record

    def remove(self, index: int) -> None:
        """Forget; no error when there is none."""
        self._map.delete(codecs.u32(index))
        self._known.pop(index, None)

    def __len__(self) -> int:
        return len(self._known)

    def __iter__(self) -> Iterator[PodRecord]:
        return iter(sorted(self._known.values(), key=lambda record: record.key))

    def named(self, key: str) -> PodRecord | None:
        """The record of the pod `key`."""
        return next((record for record in self._known.values() if record.key == key), None)

    def of_netns(self, cookie: int) -> PodRecord | None:
        """The record of the pod that lives in this netns."""
        return next((record for record in self._known.values() if record.cookie == cookie), None)

    def free_index(self, besides: Collection[int] = ()) -> int:
        """A pod index that is not in use, nor in `besides`; MeshbpfError when all are."""
        for index in range(1, MAX_PODS):
            if index not in self._known and index not in besides:
                return index
        raise MeshbpfError(
            "too-many-pods", f"this agent has {len(self._known)} pods, the most it takes"
        )


def _decoded(stored: Map) -> Iterator[PodRecord]:
    for _, raw in stored.items():
        yield msgspec.json.decode(raw.rstrip(b"\0"), type=PodRecord)
