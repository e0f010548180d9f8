"""Typed, thin bpf(2): maps, programs, links and pins, by file descriptor.

Descriptors go in and out as plain ints that the caller owns (all of them
close-on-exec); objects with a lifetime are in `maps` and `objects`. Types and
flags are the kernel's numbers, from the enumerations of `abi` or of the
catalogue. Keys and values are bytes in native byte order. What a descriptor
is about is asked in `bpfinfo`. Every function raises BpfError unless it says
otherwise.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshbpf.agent.datapath.abi import Cmd, MultiAttach, Update
from meshbpf.agent.datapath.bpfcall import BpfError, address_of, bpf
from meshbpf.agent.datapath.verifier import VerifierError

_NAME_BYTES: Final = 15  # BPF_OBJ_NAME_LEN less its terminator
_LOG_BYTES: Final = 1 << 20
_LOG_LIMIT_BYTES: Final = 1 << 26
_BPF_F_REPLACE: Final = 1 << 2
# A newer kernel writes back a longer context than it was given.
_NEWER_CONTEXT_BYTES: Final = 256
_TEST_RUN_ATTR: Final = "IIIIQQIIIIQQII"


def _buffer(data: bytes) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(data, max(len(data), 1))


def object_name(text: str) -> bytes:
    """The name the kernel shows: at most 15 of letters, digits, `_` and `.`."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "_.") else "_" for c in text)
    return kept[:_NAME_BYTES].encode()


# -- maps ---------------------------------------------------------------------


def map_create(
    map_type: int,
    key_size: int,
    value_size: int,
    max_entries: int,
    *,
    name: str = "",
    flags: int = 0,
    inner_fd: int = 0,
    btf_fd: int = 0,
    btf_key_type: int = 0,
    btf_value_type: int = 0,
) -> int:
    """A new map. Socket storage wants `btf_*`, maps of maps an `inner_fd`."""
    attr = bytearray(
        struct.pack(
            "IIIIIII16sIIII",
            map_type, key_size, value_size, max_entries, flags, inner_fd,
            0, object_name(name), 0, btf_fd, btf_key_type, btf_value_type,
        )
    )  # fmt: skip
    return bpf(Cmd.MAP_CREATE, attr, f"map {name or map_type}")


def _element(fd: int, key: int, value: int, flags: int) -> bytearray:
    return bytearray(struct.pack("IIQQQ", fd, 0, key, value, flags))


def map_lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """The value under `key`, None when there is none.

    `value_size` is what the kernel writes: for per-CPU maps the size rounded
    up to 8, times `possible_cpus()`.
    """
    key_buffer, value = _buffer(key), ctypes.create_string_buffer(value_size)
    attr = _element(fd, address_of(key_buffer), address_of(value), 0)
    try:
        bpf(Cmd.MAP_LOOKUP_ELEM, attr)
    except BpfError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return value.raw


def map_update(fd: int, key: bytes, value: bytes, flags: Update = Update.ANY) -> None:
    """Set one element."""
    key_buffer, value_buffer = _buffer(key), _buffer(value)
    bpf(Cmd.MAP_UPDATE_ELEM, _element(fd, address_of(key_buffer), address_of(value_buffer), flags))


def map_delete(fd: int, key: bytes) -> bool:
    """Remove one element; False when it was not there."""
    key_buffer = _buffer(key)
    try:
        bpf(Cmd.MAP_DELETE_ELEM, _element(fd, address_of(key_buffer), 0, 0))
    except BpfError as error:
        if error.errno == errno.ENOENT:
            return False
        raise
    return True


def map_next_key(fd: int, key: bytes | None, key_size: int) -> bytes | None:
    """The key after `key` (the first after None), None at the end.

    The kernel restarts at the first key when `key` has been deleted
    meanwhile: take `map_keys`, which is bounded, to walk a map.
    """
    key_buffer = None if key is None else _buffer(key)
    following = ctypes.create_string_buffer(key_size)
    attr = _element(
        fd, 0 if key_buffer is None else address_of(key_buffer), address_of(following), 0
    )
    try:
        bpf(Cmd.MAP_GET_NEXT_KEY, attr)
    except BpfError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return following.raw


def map_keys(fd: int, key_size: int, max_entries: int) -> Iterator[bytes]:
    """The keys, each once. Deleting the key just given is allowed.

    The next key is read before the present one is given out. A walk that
    meets concurrent writers may miss keys, but it ends: no key is given
    twice and no more than `max_entries` of them.
    """
    seen: set[bytes] = set()
    key = map_next_key(fd, None, key_size)
    while key is not None and key not in seen and len(seen) < max_entries:
        seen.add(key)
        following = map_next_key(fd, key, key_size)
        yield key
        key = following


def _batch(cmd: Cmd, fd: int, keys: Sequence[bytes], values: Sequence[bytes], flags: int) -> int:
    if not keys:
        return 0
    key_buffer, value_buffer = _buffer(b"".join(keys)), _buffer(b"".join(values))
    attr = bytearray(
        struct.pack(
            "QQQQIIQQ",
            0, 0, address_of(key_buffer), address_of(value_buffer) if values else 0,
            len(keys), fd, flags, 0,
        )
    )  # fmt: skip
    try:
        bpf(cmd, attr)
    finally:
        done: int = struct.unpack_from("I", attr, 32)[0]
    return done


def map_pop(fd: int, value_size: int) -> bytes:
    """The oldest element of a queue, which is removed. BpfError ENOENT when it is empty."""
    value = ctypes.create_string_buffer(value_size)
    bpf(Cmd.MAP_LOOKUP_AND_DELETE_ELEM, _element(fd, 0, address_of(value), 0))
    return value.raw


def map_lookup_batch(
    fd: int, key_size: int, value_size: int, count: int
) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a hash, `count` in one call. Elements may move meanwhile.

    BpfError ENOSPC when one bucket holds more than `count`.
    """
    keys = ctypes.create_string_buffer(key_size * count)
    values = ctypes.create_string_buffer(value_size * count)
    position = ctypes.create_string_buffer(max(key_size, 8))
    began = False
    while True:
        attr = bytearray(
            struct.pack(
                "QQQQIIQQ",
                address_of(position) if began else 0, address_of(position),
                address_of(keys), address_of(values), count, fd, 0, 0,
            )
        )  # fmt: skip
        ended = False
        try:
            bpf(Cmd.MAP_LOOKUP_BATCH, attr)
        except BpfError as error:
            if error.errno != errno.ENOENT:
                raise
            ended = True
        began = True
        found: int = struct.unpack_from("I", attr, 32)[0]
        raw_keys, raw_values = keys.raw, values.raw
        for index in range(found):
            yield (
                raw_keys[index * key_size : (index + 1) * key_size],
                raw_values[index * value_size : (index + 1) * value_size],
            )
        if ended:
            return


def map_update_batch(
    fd: int, entries: Sequence[tuple[bytes, bytes]], flags: Update = Update.ANY
) -> int:
    """Set many elements in one call; hash, LRU and array maps, and LPM tries.

    Not atomic as a whole: programs see each element as it is set.
    """
    keys, values = [key for key, _ in entries], [value for _, value in entries]
    return _batch(Cmd.MAP_UPDATE_BATCH, fd, keys, values, flags)


def map_delete_batch(fd: int, keys: Sequence[bytes]) -> int:
    """Remove many elements in one call; stops with ENOENT at one that is not there."""
    return _batch(Cmd.MAP_DELETE_BATCH, fd, keys, (), 0)


def map_mmap(fd: int, length: int) -> mmap.mmap:
    """An array map created with MapFlag.MMAPABLE as shared memory.

    Writes are seen by programs at once and cost no system call. The mapping
    keeps the map alive after `fd` is closed.
    """
    return mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


def possible_cpus() -> int:
    """How many values a per-CPU map holds per key."""
    text = Path("/sys/devices/system/cpu/possible").read_text()
    return int(text.strip().rpartition(",")[2].rpartition("-")[2]) + 1


def btf_load(blob: bytes) -> int:
    """A BTF object, made by `btf`."""
    data = _buffer(blob)
    return bpf(
        Cmd.BTF_LOAD, bytearray(struct.pack("QQIII", address_of(data), 0, len(blob), 0, 0)), "BTF"
    )


# -- programs -----------------------------------------------------------------


def prog_load(
    prog_type: int,
    instructions: bytes,
    *,
    name: str = "",
    attach_type: int = 0,
    prog_license: str = "GPL",
) -> int:
    """A verified program. VerifierError when it was refused, with the log.

    The first try asks for no log, since writing one costs more than the
    verification; a refused program is tried again with it.
    """
    code, terms = _buffer(instructions), _buffer(prog_license.encode() + b"\0")

    def attempt(log: ctypes.Array[ctypes.c_char] | None) -> int:
        attr = bytearray(
            struct.pack(
                "IIQQIIQII16sII",
                prog_type, len(instructions) // 8, address_of(code), address_of(terms),
                0 if log is None else 1, 0 if log is None else len(log),
                0 if log is None else address_of(log),
                0, 0, object_name(name), 0, attach_type,
            )
        )  # fmt: skip
        return bpf(Cmd.PROG_LOAD, attr, f"program {name}")

    try:
        return attempt(None)
    except BpfError as error:
        if error.errno in (errno.EPERM, errno.ENOSYS):
            raise
    size = _LOG_BYTES
    while True:
        log = ctypes.create_string_buffer(size)
        try:
            return attempt(log)
        except BpfError as error:
            if error.errno == errno.ENOSPC and size < _LOG_LIMIT_BYTES:
                size *= 8
                continue
            text = log.value.decode(errors="replace")
            raise VerifierError(name, error.errno, text, os.strerror(error.errno)) from None


@dataclass(frozen=True, slots=True)
class TestRun:
    """What a program answered in PROG_TEST_RUN."""

    retval: int
    duration_ns: int
    data: bytes
    context: bytes


def prog_test_run(
    fd: int, *, data: bytes = b"", context: bytes = b"", repeat: int = 1, out_bytes: int = 0
) -> TestRun:
    """Run a program on made-up input. Which inputs a type takes differs.

    TC wants `data` of at least 14 bytes and takes a `__sk_buff`; sk_lookup
    takes only a `context`; cgroup address hooks cannot be run at all.
    """
    room = out_bytes or (len(data) + 256 if data else 0)
    data_in, data_out = _buffer(data), ctypes.create_string_buffer(max(room, 1))
    context_room = len(context) + _NEWER_CONTEXT_BYTES if context else 0
    context_in, context_out = _buffer(context), ctypes.create_string_buffer(max(context_room, 1))
    attr = bytearray(
        struct.pack(
            _TEST_RUN_ATTR,
            fd, 0, len(data), room if data else 0,
            address_of(data_in) if data else 0, address_of(data_out) if data else 0,
            repeat, 0, len(context), context_room,
            address_of(context_in) if context else 0, address_of(context_out) if context else 0,
            0, 0,
        )
    )  # fmt: skip
    bpf(Cmd.PROG_TEST_RUN, attr)
    answer = struct.unpack_from(_TEST_RUN_ATTR, attr)
    return TestRun(
        retval=answer[1],
        duration_ns=answer[7],
        data=data_out.raw[: answer[3]] if data else b"",
        context=context_out.raw[: answer[9]] if context else b"",
    )


# -- links --------------------------------------------------------------------


def link_create(
    prog_fd: int,
    target: int,
    attach_type: int,
    *,
    flags: MultiAttach = MultiAttach.NONE,
    relative: int = 0,
) -> int:
    """Attach a program for as long as the link, or a pin of it, lives.

    `target` is a netns or cgroup descriptor, or the interface's index in the
    caller's netns for tcx. `flags` and `relative` place a tcx link.
    """
    attr = bytearray(struct.pack("iIII", prog_fd, target, attach_type, flags))
    if relative:
        attr += struct.pack("IIQ", relative, 0, 0)
    return bpf(Cmd.LINK_CREATE, attr, f"attach type {attach_type}")


def link_update(fd: int, prog_fd: int, *, expected_prog_fd: int = 0) -> None:
    """Replace the link's program, with no moment in which none runs.

    ENOLINK: the target (netns, interface, cgroup) is gone. With
    `expected_prog_fd` only while that program is the present one.
    """
    flags = _BPF_F_REPLACE if expected_prog_fd else 0
    bpf(Cmd.LINK_UPDATE, bytearray(struct.pack("IIII", fd, prog_fd, flags, expected_prog_fd)))


def link_detach(fd: int) -> None:
    """Stop the link's program now, whoever still holds or pins the link."""
    bpf(Cmd.LINK_DETACH, bytearray(struct.pack("I", fd)))


# -- pins ---------------------------------------------------------------------


def obj_pin(fd: int, path: Path) -> None:
    """Give a map, program or link a name in bpffs that keeps it alive."""
    name = _buffer(os.fsencode(path) + b"\0")
    bpf(Cmd.OBJ_PIN, bytearray(struct.pack("QII", address_of(name), fd, 0)), str(path))


def obj_get(path: Path) -> int:
    """Open what is pinned at `path`; ENOENT when nothing is."""
    name = _buffer(os.fsencode(path) + b"\0")
    return bpf(Cmd.OBJ_GET, bytearray(struct.pack("QII", address_of(name), 0, 0)), str(path))
