"""What the kernel knows of a map, program or link, and which of them exist."""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from meshbpf.agent.datapath.abi import Cmd, LinkType, MapFlag
from meshbpf.agent.datapath.bpfcall import BpfError, address_of, bpf

# Sizes of bpf_map_info, bpf_prog_info and bpf_link_info as of 6.1 and, for
# links, with room for younger kinds; an older kernel fills what it has.
_MAP_INFO_BYTES: Final = 88
_PROG_INFO_BYTES: Final = 232
_LINK_INFO_BYTES: Final = 64
_MAX_MAP_IDS: Final = 64
_QUERY_IDS: Final = 64
_QUERY_ATTR_BYTES: Final = 64


@dataclass(frozen=True, slots=True)
class MapInfo:
    """`struct bpf_map_info`."""

    id: int
    type: int  # MapType when meshbpf knows it
    key_size: int
    value_size: int
    max_entries: int
    flags: MapFlag
    name: str


@dataclass(frozen=True, slots=True)
class ProgInfo:
    """`struct bpf_prog_info`; run counts stay 0 unless kernel.bpf_stats_enabled is set."""

    id: int
    type: int  # ProgType when meshbpf knows it
    tag: str
    name: str
    map_ids: tuple[int, ...]
    verified_instructions: int
    run_count: int
    run_time_ns: int


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """`struct bpf_link_info`.

    One of the last three is set, by the link's type, and is 0 once that
    target is gone.
    """

    id: int
    type: int  # LinkType when meshbpf knows it
    prog_id: int
    attach_type: int
    netns_inode: int = 0
    cgroup_id: int = 0
    ifindex: int = 0


def _info(fd: int, buffer: ctypes.Array[ctypes.c_char]) -> bytes:
    attr = bytearray(struct.pack("IIQ", fd, len(buffer), address_of(buffer)))
    bpf(Cmd.OBJ_GET_INFO_BY_FD, attr)
    return buffer.raw


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode(errors="replace")


def map_info(fd: int) -> MapInfo:
    """What map `fd` is."""
    raw = _info(fd, ctypes.create_string_buffer(_MAP_INFO_BYTES))
    kind, number, key, value, entries, flags, name = struct.unpack_from("6I16s", raw)
    return MapInfo(number, kind, key, value, entries, MapFlag(flags), _text(name))


def prog_info(fd: int) -> ProgInfo:
    """What program `fd` is, with the maps it uses (the first 64)."""
    ids = (ctypes.c_uint32 * _MAX_MAP_IDS)()
    request = ctypes.create_string_buffer(_PROG_INFO_BYTES)
    struct.pack_into("=IQ", request, 52, _MAX_MAP_IDS, ctypes.addressof(ids))
    raw = _info(fd, request)
    kind, number, tag = struct.unpack_from("II8s", raw)
    map_count = struct.unpack_from("I", raw, 52)[0]
    run_time, run_count = struct.unpack_from("QQ", raw, 192)
    return ProgInfo(
        id=number,
        type=kind,
        tag=tag.hex(),
        name=_text(raw[64:80]),
        map_ids=tuple(ids[: min(map_count, _MAX_MAP_IDS)]),
        verified_instructions=struct.unpack_from("I", raw, 216)[0],
        run_count=run_count,
        run_time_ns=run_time,
    )


def link_info(fd: int) -> LinkInfo:
    """What link `fd` is and where it is attached."""
    raw = _info(fd, ctypes.create_string_buffer(_LINK_INFO_BYTES))
    kind, number, prog = struct.unpack_from("III", raw)
    first, second, third = struct.unpack_from("III", raw, 16)
    if kind == LinkType.NETNS:
        return LinkInfo(number, kind, prog, second, netns_inode=first)
    if kind == LinkType.TCX:
        return LinkInfo(number, kind, prog, second, ifindex=first)
    if kind == LinkType.CGROUP:
        return LinkInfo(number, kind, prog, third, cgroup_id=first | second << 32)
    return LinkInfo(number, kind, prog, 0)


def prog_query(target: int, attach_type: int, *, flags: int = 0) -> tuple[int, ...]:
    """Ids of the programs attached to a cgroup or netns descriptor, or an ifindex for tcx."""
    ids = (ctypes.c_uint32 * _QUERY_IDS)()
    # For tcx the kernel writes the revision at byte 56 whatever size it was
    # told, so the block is as long as its struct.
    attr = bytearray(_QUERY_ATTR_BYTES)
    struct.pack_into(
        "IIIIQI", attr, 0, target, attach_type, flags, 0, ctypes.addressof(ids), _QUERY_IDS
    )
    try:
        bpf(Cmd.PROG_QUERY, attr, f"attach type {attach_type}")
    except BpfError as error:
        # An interface or netns that never had one of this kind.
        if error.errno == errno.ENOENT:
            return ()
        raise
    return tuple(ids[: struct.unpack_from("I", attr, 24)[0]])


def _ids(cmd: Cmd) -> Iterator[int]:
    last = 0
    while True:
        attr = bytearray(struct.pack("III", last, 0, 0))
        try:
            bpf(cmd, attr)
        except BpfError as error:
            if error.errno == errno.ENOENT:
                return
            raise
        last = struct.unpack_from("I", attr, 4)[0]
        yield last


def map_ids() -> Iterator[int]:
    """Ids of all maps on this machine, ascending."""
    return _ids(Cmd.MAP_GET_NEXT_ID)


def prog_ids() -> Iterator[int]:
    """Ids of all programs on this machine, ascending."""
    return _ids(Cmd.PROG_GET_NEXT_ID)


def link_ids() -> Iterator[int]:
    """Ids of all links on this machine, ascending."""
    return _ids(Cmd.LINK_GET_NEXT_ID)


def _open(cmd: Cmd, number: int, what: str) -> int:
    return bpf(cmd, bytearray(struct.pack("III", number, 0, 0)), f"{what} {number}")


def map_by_id(number: int) -> int:
    """A descriptor of the map with this id; ENOENT when it is gone."""
    return _open(Cmd.MAP_GET_FD_BY_ID, number, "map")


def prog_by_id(number: int) -> int:
    """A descriptor of the program with this id; ENOENT when it is gone."""
    return _open(Cmd.PROG_GET_FD_BY_ID, number, "program")


def link_by_id(number: int) -> int:
    """A descriptor of the link with this id; ENOENT when it is gone."""
    return _open(Cmd.LINK_GET_FD_BY_ID, number, "link")
