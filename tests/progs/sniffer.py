"""What crosses an interface, read from a packet socket in its namespace.

Keeps for each flow (protocol, ports) how many packets were seen, and the first
packets that carry one of the given plaintext markers.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from tests.progs.inside import socket_inside

_ETH_P_ALL = 3
_IPV4, _IPV6 = 0x0800, 0x86DD
_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmp6"}
_SYN, _ACK = 0x02, 0x10


@dataclass(frozen=True, slots=True, order=True)
class Packet:
    """The header fields that tests ask for; ports are 0 where there are none."""

    protocol: str
    source: str
    source_port: int
    destination: str
    destination_port: int


@dataclass(slots=True)
class Seen:
    """What a sniffer has seen until now."""

    packets: Counter[Packet] = field(default_factory=Counter)
    dials: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    plaintext: list[Packet] = field(default_factory=list)
    bytes: int = 0

    def tcp_service_ports(self) -> set[int]:
        """The lower port of every TCP flow: the one that was dialled."""
        return {
            min(packet.source_port, packet.destination_port)
            for packet in self.packets
            if packet.protocol == "tcp"
        }

    def protocols(self) -> set[str]:
        return {packet.protocol for packet in self.packets}


class Sniffer:
    """Reads `interface` of `netns` in a thread until the block ends."""

    def __init__(self, netns: str, interface: str, markers: tuple[bytes, ...] = ()) -> None:
        self.seen = Seen()
        self._markers = markers
        self._stopping = threading.Event()
        # Protocol 0 first: with ETH_P_ALL packets of all interfaces would be
        # queued before bind() narrows it down.
        self._sock = socket_inside(netns, socket.AF_PACKET, socket.SOCK_RAW)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)
        self._sock.bind((interface, _ETH_P_ALL))
        self._sock.settimeout(0.05)
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._stopping.set()
        self._thread.join()
        self._sock.close()

    def _read(self) -> None:
        while True:
            try:
                frame = self._sock.recv(1 << 17)
            except TimeoutError:
                # Only an empty queue ends it: what was sent before the end of
                # the block has been read.
                if self._stopping.is_set():
                    return
                continue
            self._take(frame)

    def _take(self, frame: bytes) -> None:
        packet, flags = parse(frame)
        seen = self.seen
        seen.bytes += len(frame)
        seen.packets[packet] += 1
        if flags & (_SYN | _ACK) == _SYN:
            seen.dials[packet.source, packet.destination, packet.destination_port] += 1
        if any(marker in frame for marker in self._markers):
            seen.plaintext.append(packet)


def parse(frame: bytes) -> tuple[Packet, int]:
    """The frame's packet and its TCP flags (0 for other protocols)."""
    kind = struct.unpack_from("!H", frame, 12)[0]
    if kind == _IPV4:
        number, offset = frame[23], 14 + (frame[14] & 15) * 4
        source = socket.inet_ntop(socket.AF_INET, frame[26:30])
        destination = socket.inet_ntop(socket.AF_INET, frame[30:34])
    elif kind == _IPV6:
        number, offset = frame[20], 54
        source = socket.inet_ntop(socket.AF_INET6, frame[22:38])
        destination = socket.inet_ntop(socket.AF_INET6, frame[38:54])
    else:
        return Packet(f"ethertype {kind:#06x}", "", 0, "", 0), 0
    protocol = _PROTOCOLS.get(number, f"protocol {number}")
    if protocol not in ("tcp", "udp"):
        return Packet(protocol, source, 0, destination, 0), 0
    source_port, destination_port = struct.unpack_from("!HH", frame, offset)
    flags = frame[offset + 13] if protocol == "tcp" else 0
    return Packet(protocol, source, source_port, destination, destination_port), flags
