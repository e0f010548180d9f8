"""Tiny programs and maps that ask the kernel whether it can do something.

Each function tries the real thing and raises BpfError when the kernel says
no. Nothing is attached and every descriptor is closed again. The few
instructions are written out, since a probe must not need a compiler.
Helper numbers are those of `enum bpf_func_id`; context offsets those of the
UAPI structs named beside them.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from meshbpf.agent.datapath import bpfsys, btf
from meshbpf.agent.datapath.abi import AttachType, MapFlag, MapType, ProgType
from meshbpf.agent.datapath.bpfcall import BpfError

_SK_RELEASE: Final = 86
_SKC_LOOKUP_TCP: Final = 99
_SK_STORAGE_GET: Final = 107
_GET_NETNS_COOKIE: Final = 122
_SK_ASSIGN: Final = 124
_SET_RETVAL: Final = 187
_MAP_LOOKUP: Final = 1

_SK_BUFF_SOCKET: Final = 168  # offsetof(struct __sk_buff, sk)
_SOCK_ADDR_SOCKET: Final = 64  # offsetof(struct bpf_sock_addr, sk)
_NO_INTERFACE: Final = 0x7FFF_FFFF


def _op(code: int, target: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    registers = target | source << 4 if sys.byteorder == "little" else target << 4 | source
    return struct.pack("=BBhi", code, registers, offset, value)


def _copy(target: int, source: int) -> bytes:
    return _op(0xBF, target, source)


def _set(target: int, value: int) -> bytes:
    return _op(0xB7, target, value=value)


def _call(helper: int) -> bytes:
    return _op(0x85, value=helper)


def _load_map(target: int, fd: int) -> bytes:
    return _op(0x18, target, 1, value=fd) + _op(0)


def _load(target: int, source: int, offset: int) -> bytes:
    return _op(0x79, target, source, offset)


def _skip_if_zero(register: int, following: bytes) -> bytes:
    return _op(0x15, register, offset=len(following) // 8) + following


def _end(value: int) -> bytes:
    return _set(0, value) + _op(0x95)


# A key of zeros below the frame pointer, its address in r2.
_ZERO_KEY: Final = (
    _op(0x7A, 10, offset=-8) + _op(0x7A, 10, offset=-16) + _copy(2, 10) + _op(0x07, 2, value=-8)
)


def _try(kind: ProgType, code: bytes, attach_type: int = 0) -> None:
    os.close(bpfsys.prog_load(kind, code, name="meshbpf_probe", attach_type=attach_type))


@contextmanager
def _map(
    kind: MapType, key: int, value: int, entries: int, flags: MapFlag = MapFlag.NONE
) -> Iterator[int]:
    fd = bpfsys.map_create(kind, key, value, entries, name="meshbpf_probe", flags=flags)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _storage() -> Iterator[int]:
    blob = bpfsys.btf_load(btf.storage_btf(4))
    try:
        fd = bpfsys.map_create(
            MapType.SK_STORAGE, 4, 4, 0, name="meshbpf_probe", flags=MapFlag.NO_PREALLOC,
            btf_fd=blob, btf_key_type=btf.KEY_TYPE, btf_value_type=btf.VALUE_TYPE,
        )  # fmt: skip
    finally:
        os.close(blob)
    try:
        yield fd
    finally:
        os.close(fd)


def bpf_call() -> None:
    """bpf(2) is there and we may use it: maps are free to all on some systems, TC is not."""
    with _map(MapType.ARRAY, 4, 8, 1):
        _try(ProgType.SCHED_CLS, _end(0))


def connect_hook() -> None:
    """cgroup/connect4 and connect6 that know the caller's netns and choose the errno."""
    code = _copy(6, 1) + _call(_GET_NETNS_COOKIE) + _set(1, -errno.ECONNREFUSED)
    code += _call(_SET_RETVAL) + _end(1)
    for attach_type in (AttachType.CGROUP_INET4_CONNECT, AttachType.CGROUP_INET6_CONNECT):
        _try(ProgType.CGROUP_SOCK_ADDR, code, attach_type)


def sk_lookup_hook() -> None:
    """sk_lookup programs that choose the listener, from a sockhash."""
    with _map(MapType.SOCKHASH, 8, 8, 1) as sockets:
        assign = (
            _copy(7, 0) + _copy(1, 6) + _copy(2, 7) + _set(3, 0) + _call(_SK_ASSIGN)
            + _copy(1, 7) + _call(_SK_RELEASE)
        )  # fmt: skip
        code = _copy(6, 1) + _load_map(1, sockets) + _ZERO_KEY + _call(_MAP_LOOKUP)
        code += _skip_if_zero(0, assign) + _end(1)
        _try(ProgType.SK_LOOKUP, code, AttachType.SK_LOOKUP)


def tc_classifier() -> None:
    """TC programs that find a packet's connection."""
    release = _copy(1, 0) + _call(_SK_RELEASE)
    code = _ZERO_KEY + _op(0x07, 2, value=-4) + _set(3, 12) + _set(4, -1) + _set(5, 0)
    code += _call(_SKC_LOOKUP_TCP) + _skip_if_zero(0, release) + _end(0)
    _try(ProgType.SCHED_CLS, code)


def tcx() -> None:
    """TC programs attached by a link. Tried on an interface that cannot exist."""
    program = bpfsys.prog_load(ProgType.SCHED_CLS, _end(0), name="meshbpf_probe")
    try:
        os.close(bpfsys.link_create(program, _NO_INTERFACE, AttachType.TCX_EGRESS))
    except BpfError as error:
        if error.errno != errno.ENODEV:  # the kernel knew the type, and looked for it
            raise
    finally:
        os.close(program)


def socket_storage() -> None:
    """Socket storage, from the connect hook and from TC."""
    with _storage() as storage:

        def getting(socket_offset: int) -> bytes:
            get = _copy(2, 1) + _load_map(1, storage) + _set(3, 0) + _set(4, 0)
            get += _call(_SK_STORAGE_GET)
            return _load(1, 1, socket_offset) + _skip_if_zero(1, get)

        _try(ProgType.SCHED_CLS, getting(_SK_BUFF_SOCKET) + _end(0))
        _try(
            ProgType.CGROUP_SOCK_ADDR,
            getting(_SOCK_ADDR_SOCKET) + _end(1),
            AttachType.CGROUP_INET4_CONNECT,
        )


def shared_array() -> None:
    """Array maps as shared memory."""
    with _map(MapType.ARRAY, 4, 8, 1, MapFlag.MMAPABLE) as array:
        bpfsys.map_mmap(array, os.sysconf("SC_PAGE_SIZE")).close()


def prefix_map() -> None:
    """Longest-prefix-match tries."""
    with _map(MapType.LPM_TRIE, 24, 4, 1, MapFlag.NO_PREALLOC):
        pass


def lru_map() -> None:
    """Hashes that drop their oldest entries."""
    with _map(MapType.LRU_HASH, 8, 8, 64):
        pass


def ring_buffer() -> None:
    """Ring buffers."""
    with _map(MapType.RINGBUF, 0, 0, os.sysconf("SC_PAGE_SIZE")):
        pass
