"""The kernel does through bpfsys what its documentation says."""

from __future__ import annotations

import errno
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from meshbpf.agent.datapath import bpfinfo, bpfsys
from meshbpf.agent.datapath.abi import AttachType, LinkType, MapFlag, MapType, ProgType, Update
from meshbpf.agent.datapath.bpfcall import BpfError

pytestmark = pytest.mark.root

PAGE = os.sysconf("SC_PAGE_SIZE")


def returning(value: int) -> bytes:
    """A program that returns `value`."""
    return struct.pack("=BBhiBBhi", 0xB7, 0, 0, value, 0x95, 0, 0, 0)


def key(number: int) -> bytes:
    return struct.pack("=I", number)


@contextmanager
def a_map(kind: MapType, key_size: int = 4, value_size: int = 8, **more: int) -> Iterator[int]:
    fd = bpfsys.map_create(
        kind, key_size, value_size, more.get("entries", 16), name="ld", flags=more.get("flags", 0)
    )
    yield fd
    os.close(fd)


@contextmanager
def a_program(kind: ProgType = ProgType.SCHED_CLS, value: int = 1, at: int = 0) -> Iterator[int]:
    fd = bpfsys.prog_load(kind, returning(value), name="ld", attach_type=at)
    yield fd
    os.close(fd)


@pytest.fixture
def netns() -> Iterator[int]:
    name = f"ld-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    fd = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
    yield fd
    os.close(fd)
    subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.fixture
def pin() -> Iterator[Path]:
    path = Path(f"/sys/fs/bpf/ld-{os.getpid()}")
    yield path
    path.unlink(missing_ok=True)


def test_hash_keeps_what_it_was_given() -> None:
    with a_map(MapType.HASH) as fd:
        assert bpfsys.map_lookup(fd, key(1), 8) is None
        bpfsys.map_update(fd, key(1), b"one.....")
        assert bpfsys.map_lookup(fd, key(1), 8) == b"one....."
        with pytest.raises(BpfError) as caught:
            bpfsys.map_update(fd, key(1), b"two.....", Update.NOEXIST)
        assert caught.value.errno == errno.EEXIST
        assert bpfsys.map_delete(fd, key(1))
        assert not bpfsys.map_delete(fd, key(1))


def test_a_walk_gives_each_key_once_while_they_are_deleted() -> None:
    with a_map(MapType.HASH, entries=64) as fd:
        wanted = {key(number) for number in range(50)}
        assert bpfsys.map_update_batch(fd, [(one, bytes(8)) for one in wanted]) == 50
        seen = []
        for one in bpfsys.map_keys(fd, 4, 64):
            seen.append(one)
            assert bpfsys.map_delete(fd, one)
        assert sorted(seen) == sorted(wanted)


def test_a_batch_of_deletes_stops_at_a_key_that_is_not_there() -> None:
    with a_map(MapType.HASH) as fd:
        bpfsys.map_update_batch(fd, [(key(1), bytes(8)), (key(2), bytes(8))])
        with pytest.raises(BpfError) as caught:
            bpfsys.map_delete_batch(fd, [key(1), key(9), key(2)])
        assert caught.value.errno == errno.ENOENT
        assert list(bpfsys.map_keys(fd, 4, 16)) == [key(2)]


def test_per_cpu_values_come_for_every_possible_cpu() -> None:
    with a_map(MapType.PERCPU_ARRAY, entries=1) as fd:
        raw = bpfsys.map_lookup(fd, key(0), 8 * bpfsys.possible_cpus())
        assert raw == bytes(8 * bpfsys.possible_cpus())


def test_shared_memory_is_the_array() -> None:
    with a_map(MapType.ARRAY, entries=2, flags=MapFlag.MMAPABLE) as fd:
        memory = bpfsys.map_mmap(fd, PAGE)
        with closing(memory):
            memory[8:16] = b"the beat"
            assert bpfsys.map_lookup(fd, key(1), 8) == b"the beat"


def test_information_is_what_was_asked_for() -> None:
    with a_map(MapType.LPM_TRIE, 24, 4, flags=MapFlag.NO_PREALLOC) as fd, a_program() as prog:
        info = bpfinfo.map_info(fd)
        assert (info.type, info.key_size, info.value_size) == (MapType.LPM_TRIE, 24, 4)
        assert (info.max_entries, info.flags, info.name) == (16, MapFlag.NO_PREALLOC, "ld")
        assert info.id in bpfinfo.map_ids()
        program = bpfinfo.prog_info(prog)
        assert (program.type, program.name, program.map_ids) == (ProgType.SCHED_CLS, "ld", ())
        assert program.verified_instructions == 2
        with a_map(MapType.HASH) as _:
            again = bpfinfo.prog_by_id(program.id)
            assert bpfinfo.prog_info(again) == program
            os.close(again)


def test_descriptors_are_closed_on_exec() -> None:
    with a_map(MapType.HASH) as fd, a_program() as prog:
        assert not os.get_inheritable(fd)
        assert not os.get_inheritable(prog)


def test_programs_run_on_made_up_input() -> None:
    with a_program(value=7) as prog:
        answer = bpfsys.prog_test_run(prog, data=bytes(64), repeat=3)
        assert (answer.retval, answer.data) == (7, bytes(64))
    with a_program(ProgType.SK_LOOKUP, 0, AttachType.SK_LOOKUP) as prog:
        context = struct.pack("=QII", 0, 2, 6) + bytes(48)
        assert bpfsys.prog_test_run(prog, context=context).retval == 0


def test_a_pinned_link_outlives_its_maker_and_takes_a_new_program(netns: int, pin: Path) -> None:
    maker = f"""
import os, signal
from pathlib import Path
from meshbpf.agent.datapath import bpfsys
prog = bpfsys.prog_load(30, {returning(1)!r}, attach_type=36)
bpfsys.obj_pin(bpfsys.link_create(prog, {netns}, 36), Path({str(pin)!r}))
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", maker], pass_fds=[netns], check=False)
    assert ended.returncode == -signal.SIGKILL
    link = bpfsys.obj_get(pin)
    try:
        info = bpfinfo.link_info(link)
        assert (info.type, info.attach_type) == (LinkType.NETNS, AttachType.SK_LOOKUP)
        assert info.netns_inode == os.fstat(netns).st_ino
        assert bpfinfo.prog_query(netns, AttachType.SK_LOOKUP) == (info.prog_id,)
        with a_program(ProgType.SK_LOOKUP, 1, AttachType.SK_LOOKUP) as prog:
            bpfsys.link_update(link, prog)
            assert bpfinfo.link_info(link).prog_id == bpfinfo.prog_info(prog).id
        bpfsys.link_detach(link)
        assert bpfinfo.prog_query(netns, AttachType.SK_LOOKUP) == ()
    finally:
        os.close(link)


def test_a_tcx_link_knows_its_interface() -> None:
    loopback = 1
    with a_program() as prog:
        try:
            link = bpfsys.link_create(prog, loopback, AttachType.TCX_EGRESS)
        except BpfError as error:
            if tuple(map(int, os.uname().release.split(".")[:2])) < (6, 6):
                pytest.skip(f"tcx came with Linux 6.6: {error}")
            raise
        try:
            info = bpfinfo.link_info(link)
            assert (info.type, info.ifindex) == (LinkType.TCX, loopback)
            assert info.prog_id in bpfinfo.prog_query(loopback, AttachType.TCX_EGRESS)
        finally:
            os.close(link)


def test_an_interface_that_is_gone_is_an_error_with_its_errno() -> None:
    with a_program() as prog, pytest.raises(BpfError) as caught:
        bpfsys.link_create(prog, 0x7FFFFFFF, AttachType.TCX_EGRESS)
    assert caught.value.errno in (errno.ENODEV, errno.EINVAL)


def test_programs_load_while_signals_interrupt_the_verifier() -> None:
    # A chain of branches, so that the verifier takes long enough to be hit.
    branches = b"".join(struct.pack("=BBhi", 0x15, 0x1, 0, number) for number in range(4000))
    code = struct.pack("=BBhi", 0xB7, 1, 0, 0) + branches + returning(0)
    started = time.monotonic()
    os.close(bpfsys.prog_load(ProgType.SCHED_CLS, code))
    load_s = time.monotonic() - started
    hits = []
    before = signal.signal(signal.SIGALRM, lambda *_: hits.append(1))
    # One signal in about three loads; a load that never got through would hang here.
    signal.setitimer(signal.ITIMER_REAL, load_s, 3 * load_s)
    try:
        for _ in range(60):
            os.close(bpfsys.prog_load(ProgType.SCHED_CLS, code))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(hits) > 5


def test_errors_of_one_thread_do_not_show_in_another() -> None:
    with a_map(MapType.HASH, entries=64) as fd:

        def work(number: int) -> int:
            wrong = 0
            for _ in range(500):
                wrong += bpfsys.map_lookup(fd, key(1000 + number), 8) is not None  # ENOENT
                bpfsys.map_update(fd, key(number), struct.pack("=Q", number))
                wrong += bpfsys.map_lookup(fd, key(number), 8) != struct.pack("=Q", number)
            return wrong

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(work, range(8))) == 0


@pytest.mark.parametrize("path", [Path("/sys/fs/bpf/ld-nothing"), Path("/nowhere/at/all")])
def test_a_missing_pin_is_enoent_and_names_its_path(path: Path) -> None:
    with pytest.raises(BpfError, match=str(path)) as caught:
        bpfsys.obj_get(path)
    assert caught.value.errno == errno.ENOENT
    assert caught.value.code == "bpf-obj-get"
