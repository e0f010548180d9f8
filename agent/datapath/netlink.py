"""Netlink messages: building, asking, reading replies.

The few dozen messages that steering needs, over a plain blocking socket. A
library would bring an event loop and a quarter of a second of imports into
every attach; the protocol itself is a header and aligned attributes. What the
messages mean is in `rtnetlink` and `sockdiag`.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from itertools import count
from types import TracebackType
from typing import Final, Self

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.datapath.netns import Netns

NLM_F_REQUEST: Final = 0x001
NLM_F_ACK: Final = 0x004
NLM_F_DUMP: Final = 0x300
NLM_F_REPLACE: Final = 0x100
NLM_F_EXCL: Final = 0x200
NLM_F_CREATE: Final = 0x400

_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_NLM_F_CAPPED: Final = 0x100
_NLM_F_ACK_TLVS: Final = 0x200
_NLMSGERR_ATTR_MSG: Final = 1
_SOL_NETLINK: Final = 270
_NETLINK_EXT_ACK: Final = 11
_NLA_TYPE_MASK: Final = 0x3FFF
_NLA_F_NESTED: Final = 0x8000
_HEADER: Final = struct.Struct("IHHII")
_RECEIVE_BYTES: Final = 1 << 18
_TIMEOUT_S: Final = 10


class NetlinkError(MeshbpfError):
    """The kernel refused a netlink request; `errno` says how."""

    def __init__(self, what: str, number: int, detail: str = "") -> None:
        text = f"{what}: {os.strerror(number)}" + (f" ({detail})" if detail else "")
        super().__init__("netlink", text)
        self.errno = number


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute, padded to 4 bytes."""
    length = 4 + len(payload)
    return struct.pack("HH", length, kind) + payload + bytes(-length % 4)


def u32(kind: int, value: int) -> bytes:
    """An attribute that is a 32-bit number in host order."""
    return attribute(kind, struct.pack("I", value))


def text(kind: int, value: str) -> bytes:
    """An attribute that is a C string."""
    return attribute(kind, value.encode() + b"\0")


def nested(kind: int, *parts: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(kind | _NLA_F_NESTED, b"".join(parts))


def attributes(data: bytes) -> Mapping[int, bytes]:
    """The attributes in `data`; of a repeated kind the last."""
    found: dict[int, bytes] = {}
    offset = 0
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("HH", data, offset)
        if length < 4:
            break
        found[kind & _NLA_TYPE_MASK] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


class Netlink:
    """One netlink socket in one netns. Not for use by two threads at once."""

    def __init__(self, netns: Netns | None, protocol: int) -> None:
        make = socket.socket if netns is None else netns.socket
        self._socket = make(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
        self._sequence = count(1)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        self._socket.settimeout(_TIMEOUT_S)
        self._socket.bind((0, 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.close()

    def _send(self, kind: int, flags: int, body: bytes) -> int:
        sequence = next(self._sequence)
        header = _HEADER.pack(_HEADER.size + len(body), kind, NLM_F_REQUEST | flags, sequence, 0)
        self._socket.send(header + body)
        return sequence

    def _replies(self, sequence: int, what: str) -> Iterator[tuple[int, int, bytes]]:
        """(type, flags, body) of each message that answers `sequence`."""
        while True:
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except TimeoutError:
                raise NetlinkError(what, errno.ETIMEDOUT) from None
            offset = 0
            while offset + _HEADER.size <= len(data):
                length, kind, flags, number, _ = _HEADER.unpack_from(data, offset)
                if number == sequence:
                    yield kind, flags, data[offset + _HEADER.size : offset + length]
                offset += (length + 3) & ~3

    def _raise_on_error(self, flags: int, body: bytes, what: str) -> None:
        (code,) = struct.unpack_from("i", body)
        if code == 0:
            return
        detail = ""
        if flags & _NLM_F_ACK_TLVS:
            (echoed,) = struct.unpack_from("I", body, 4)
            start = 4 + (_HEADER.size if flags & _NLM_F_CAPPED else echoed)
            message = attributes(body[start:]).get(_NLMSGERR_ATTR_MSG, b"")
            detail = message.rstrip(b"\0").decode(errors="replace")
        raise NetlinkError(what, -code, detail)

    def do(self, kind: int, body: bytes, what: str, flags: int = 0) -> None:
        """Ask for a change and wait for the kernel's yes; NetlinkError on a no."""
        sequence = self._send(kind, NLM_F_ACK | flags, body)
        for reply, reply_flags, data in self._replies(sequence, what):
            if reply == _NLMSG_ERROR:
                self._raise_on_error(reply_flags, data, what)
                return

    def get(self, kind: int, body: bytes, what: str) -> bytes:
        """Ask for one object; its message body."""
        sequence = self._send(kind, 0, body)
        for reply, flags, data in self._replies(sequence, what):
            if reply == _NLMSG_ERROR:
                self._raise_on_error(flags, data, what)
            return data
        raise NetlinkError(what, errno.EPROTO)

    def dump(self, kind: int, body: bytes, what: str) -> list[bytes]:
        """Ask for all objects; their message bodies."""
        found: list[bytes] = []
        sequence = self._send(kind, NLM_F_DUMP, body)
        for reply, flags, data in self._replies(sequence, what):
            if reply == _NLMSG_DONE:
                if len(data) >= 4:
                    self._raise_on_error(0, data, what)
                return found
            if reply == _NLMSG_ERROR:
                self._raise_on_error(flags, data, what)
                return found
            found.append(data)
        return found
