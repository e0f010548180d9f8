"""Maps are made as the catalogue says, and a pin of another kind is not taken for ours."""

from __future__ import annotations

import dataclasses
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from meshbpf.agent.datapath import bpfsys, btf
from meshbpf.agent.datapath.abi import MapFlag as F
from meshbpf.agent.datapath.bpfcall import BpfError
from meshbpf.agent.datapath.maps import Map, MapMismatchError, create_maps
from meshbpf.bpf import MAPS, MapFlag, MapSpec, MapType

pytestmark = pytest.mark.root

HASH = MapSpec("ld_hash", 1, MapType.HASH, 4, 8, 16)
STORAGE = MapSpec("ld_storage", 2, MapType.SK_STORAGE, 4, 12, 0, MapFlag.NO_PREALLOC)


@pytest.fixture
def pin() -> Iterator[Path]:
    path = Path(f"/sys/fs/bpf/ld-map-{os.getpid()}")
    yield path
    path.unlink(missing_ok=True)


def test_every_map_of_the_catalogue_can_be_made() -> None:
    made = create_maps(MAPS)
    assert list(made) == [spec.name for spec in MAPS]
    for one in made.values():
        one.close()


def test_when_one_map_cannot_be_made_the_others_are_closed() -> None:
    # The fixture that counts descriptors holds this.
    with pytest.raises(BpfError):
        create_maps([HASH, dataclasses.replace(HASH, key_size=0)])


def test_socket_storage_holds_a_value_per_socket_and_loses_it_with_the_socket() -> None:
    with Map.create(STORAGE) as storage, socket.socket() as kept, socket.socket() as other:
        storage.update(struct.pack("=i", kept.fileno()), b"agent's own.")
        assert storage.lookup(struct.pack("=i", kept.fileno())) == b"agent's own."
        assert storage.lookup(struct.pack("=i", other.fileno())) is None


def test_the_kernel_reads_the_size_of_a_stored_value_from_our_btf() -> None:
    blob = bpfsys.btf_load(btf.storage_btf(12))
    try:
        with pytest.raises(BpfError):
            bpfsys.map_create(
                MapType.SK_STORAGE, 4, 13, 0, flags=F.NO_PREALLOC,
                btf_fd=blob, btf_key_type=btf.KEY_TYPE, btf_value_type=btf.VALUE_TYPE,
            )  # fmt: skip
    finally:
        os.close(blob)


def test_a_pin_is_opened_as_the_same_map(pin: Path) -> None:
    with Map.create(HASH) as first:
        bpfsys.obj_pin(first.fileno(), pin)
        with Map.open(HASH, pin) as second:
            second.update(b"abcd", b"12345678")
            assert first.lookup(b"abcd") == b"12345678"
            assert dict(first.items()) == {b"abcd": b"12345678"}
            assert first.delete_many([b"abcd", b"none"]) == 1


@pytest.mark.parametrize(
    "change",
    [{"key_size": 8}, {"value_size": 16}, {"max_entries": 17}, {"type": MapType.LRU_HASH}],
    ids=str,
)
def test_a_pin_with_another_definition_is_refused(pin: Path, change: dict[str, int]) -> None:
    with Map.create(HASH) as made:
        bpfsys.obj_pin(made.fileno(), pin)
    with pytest.raises(MapMismatchError, match="ld-map"):
        Map.open(dataclasses.replace(HASH, **change), pin)  # type: ignore[arg-type]


def test_a_pinned_program_is_not_taken_for_a_map(pin: Path) -> None:
    program = bpfsys.prog_load(3, struct.pack("=BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0))
    try:
        bpfsys.obj_pin(program, pin)
    finally:
        os.close(program)
    with pytest.raises(MapMismatchError):
        Map.open(HASH, pin)


def test_keys_and_values_of_the_wrong_size_never_reach_the_kernel() -> None:
    with Map.create(HASH) as made:
        with pytest.raises(ValueError, match="key of 3 bytes"):
            made.lookup(b"abc")
        with pytest.raises(ValueError, match="value of 4 bytes"):
            made.update(b"abcd", b"1234")


def test_many_updates_work_on_maps_with_and_without_batches() -> None:
    entries = {struct.pack("=I", number): struct.pack("=Q", number) for number in range(10)}
    prefixes = {struct.pack("=II", 32, number): bytes(4) for number in range(10)}
    with Map.create(HASH) as plain:
        plain.update_many(entries)
        assert dict(plain.items()) == entries
    lpm = MapSpec("ld_lpm", 3, MapType.LPM_TRIE, 8, 4, 16, MapFlag.NO_PREALLOC)
    with Map.create(lpm) as trie:
        trie.update_many(prefixes)
        assert dict(trie.items()) == prefixes


def test_per_cpu_values_are_cut_to_their_size() -> None:
    counters = MapSpec("ld_cpu", 4, MapType.PERCPU_ARRAY, 4, 12, 2)
    with Map.create(counters) as made:
        values = made.lookup_per_cpu(struct.pack("=I", 0))
    assert values == (bytes(12),) * bpfsys.possible_cpus()


def test_shared_memory_has_room_for_every_element() -> None:
    spec = MapSpec("ld_shared", 5, MapType.ARRAY, 4, 24, 1000, MapFlag.MMAPABLE)
    with Map.create(spec) as made, closing(made.mmap()) as memory:
        memory[999 * 24 : 1000 * 24] = b"x" * 24
        assert made.lookup(struct.pack("=I", 999)) == b"x" * 24


def test_a_closed_map_cannot_be_used() -> None:
    made = Map.create(HASH)
    made.close()
    made.close()
    with pytest.raises(ValueError, match="closed"):
        made.lookup(b"abcd")
