"""mountinfo is read as the kernel writes it."""

from __future__ import annotations

from pathlib import Path

from meshbpf.agent.datapath.mounts import Mount, mounted_at, mounted_kind, mounts_of

TEXT = """\
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
42 27 0:39 / /sys/fs/bpf rw,relatime - bpf bpf rw
50 27 0:40 / /mnt/a\\040b\\134c rw shared:2 master:3 propagate_from:2 - tmpfs none rw
51 27 0:41 / /sys/fs/bpf rw - tmpfs none rw
"""


def test_fields_and_escapes(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/mountinfo").write_text(TEXT)
    mounts = mounts_of(proc=tmp_path)
    assert mounts[1] == Mount(42, "0:39", Path("/sys/fs/bpf"), "bpf")
    assert mounts[2] == Mount(50, "0:40", Path("/mnt/a b\\c"), "tmpfs")
    assert mounted_kind("bpf", mounts) == mounts[1]
    assert mounted_kind("cgroup2", mounts) is None


def test_the_mount_on_top_is_the_one_that_counts(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/mountinfo").write_text(TEXT)
    top = mounted_at(Path("/sys/fs/bpf"), mounts_of(proc=tmp_path))
    assert top is not None
    assert top.kind == "tmpfs"


def test_this_process_has_a_root_and_a_proc() -> None:
    mounts = mounts_of()
    assert mounted_at(Path("/"), mounts) is not None
    assert mounted_kind("proc", mounts) is not None
