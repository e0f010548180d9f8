"""A BPF map with its definition: the owner of one descriptor.

Keys and values are bytes; `codecs` gives them meaning.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Self

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.datapath import bpfinfo, bpfsys, btf
from meshbpf.agent.datapath.abi import Update
from meshbpf.agent.datapath.bpfcall import BpfError
from meshbpf.agent.datapath.descriptor import Descriptor
from meshbpf.bpf import MapFlag, MapSpec, MapType

_PAGE_BYTES: Final = mmap.PAGESIZE
_BATCH_ELEMENTS: Final = 1024


class MapMismatchError(MeshbpfError):
    """A pinned map that is not what the catalogue says."""


class Map(Descriptor):
    """A map of the kernel, open. Closing it ends the map unless it is pinned or in use."""

    __slots__ = ("spec",)

    def __init__(self, spec: MapSpec, fd: int) -> None:
        super().__init__(fd, f"map {spec.name}")
        self.spec = spec

    @classmethod
    def create(cls, spec: MapSpec) -> Self:
        """A new, empty map."""
        with ExitStack() as stack:
            btf_fd = 0
            if spec.type is MapType.SK_STORAGE:
                btf_fd = bpfsys.btf_load(btf.storage_btf(spec.value_size))
                stack.callback(os.close, btf_fd)
            fd = bpfsys.map_create(
                spec.type,
                spec.key_size,
                spec.value_size,
                spec.max_entries,
                name=spec.name,
                flags=spec.flags,
                btf_fd=btf_fd,
                btf_key_type=btf.KEY_TYPE if btf_fd else 0,
                btf_value_type=btf.VALUE_TYPE if btf_fd else 0,
            )
        return cls(spec, fd)

    @classmethod
    def open(cls, spec: MapSpec, path: Path) -> Self:
        """The map pinned at `path`. BpfError (ENOENT) when there is none.

        MapMismatchError when it is another map than `spec`: the kernel would
        hand it out all the same, and programs would read past its values.
        """
        fd = bpfsys.obj_get(path)
        try:
            info = bpfinfo.map_info(fd)
        except BpfError:
            os.close(fd)  # a program or link is pinned there
            raise
        have = (info.type, info.key_size, info.value_size, info.max_entries, int(info.flags))
        want = (spec.type, spec.key_size, spec.value_size, spec.max_entries, int(spec.flags))
        if have != want:
            os.close(fd)
            raise MapMismatchError(
                "bpf-map-mismatch",
                f"{path}: a map with (type, key, value, entries, flags) {have}, not {want}",
                "another program wrote there; remove the pin when nothing uses it",
            )
        return cls(spec, fd)

    def lookup(self, key: bytes) -> bytes | None:
        """The value under `key`, None when there is none; per-CPU maps: see `lookup_per_cpu`."""
        self._check_key(key)
        return bpfsys.map_lookup(self.fileno(), key, self.spec.value_size)

    def lookup_per_cpu(self, key: bytes) -> tuple[bytes, ...]:
        """The value of each possible CPU, empty when there is none under `key`."""
        self._check_key(key)
        stride = (self.spec.value_size + 7) & ~7
        raw = bpfsys.map_lookup(self.fileno(), key, stride * bpfsys.possible_cpus())
        if raw is None:
            return ()
        return tuple(
            raw[start : start + self.spec.value_size] for start in range(0, len(raw), stride)
        )

    def update(self, key: bytes, value: bytes, flags: Update = Update.ANY) -> None:
        """Set one element."""
        self._check_key(key)
        self._check_value(value)
        bpfsys.map_update(self.fileno(), key, value, flags)

    def update_many(self, entries: Mapping[bytes, bytes]) -> None:
        """Set many elements in one system call where the type allows it. Not atomic."""
        for key, value in entries.items():
            self._check_key(key)
            self._check_value(value)
        try:
            bpfsys.map_update_batch(self.fileno(), tuple(entries.items()))
        except BpfError as error:
            if error.errno not in _NO_BATCH:
                raise
            for key, value in entries.items():
                bpfsys.map_update(self.fileno(), key, value)

    def delete(self, key: bytes) -> bool:
        """Remove one element; False when it was not there."""
        self._check_key(key)
        return bpfsys.map_delete(self.fileno(), key)

    def delete_many(self, keys: Iterable[bytes]) -> int:
        """Remove elements; those that are not there are passed over. Returns how many were."""
        return sum(self.delete(key) for key in keys)

    def keys(self) -> Iterator[bytes]:
        """The keys, each once; the key just given may be deleted."""
        return bpfsys.map_keys(self.fileno(), self.spec.key_size, max(self.spec.max_entries, 1))

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Keys and values; elements that vanish meanwhile are passed over."""
        for key in self.keys():
            value = self.lookup(key)
            if value is not None:
                yield key, value

    def items_in_batches(self) -> Iterator[tuple[bytes, bytes]]:
        """Keys and values of a hash, with a system call for each thousand of them."""
        return bpfsys.map_lookup_batch(
            self.fileno(), self.spec.key_size, self.spec.value_size, _BATCH_ELEMENTS
        )

    def mmap(self) -> mmap.mmap:
        """An array map's elements as shared memory, 8-byte aligned, in order of index."""
        if not self.spec.flags & MapFlag.MMAPABLE:
            raise ValueError(f"map {self.spec.name} is not made for mmap")
        stride = (self.spec.value_size + 7) & ~7
        pages = -(-stride * self.spec.max_entries // _PAGE_BYTES)
        return bpfsys.map_mmap(self.fileno(), pages * _PAGE_BYTES)

    def _check_key(self, key: bytes) -> None:
        # The kernel reads as many bytes as the map says, whatever we hand it.
        if len(key) != self.spec.key_size:
            raise ValueError(f"map {self.spec.name}: key of {len(key)} bytes")

    def _check_value(self, value: bytes) -> None:
        if len(value) != self.spec.value_size:
            raise ValueError(f"map {self.spec.name}: value of {len(value)} bytes")


# ENOTSUPP is the kernel's own and has no name in `errno`.
_ENOTSUPP: Final = 524
_NO_BATCH: Final = frozenset({_ENOTSUPP, errno.EOPNOTSUPP, errno.EINVAL})


def create_maps(specs: Iterable[MapSpec]) -> dict[str, Map]:
    """New maps by name. On failure none is left open."""
    with ExitStack() as stack:
        made = {spec.name: stack.enter_context(Map.create(spec)) for spec in specs}
        stack.pop_all()
    return made
