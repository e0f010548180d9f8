"""Which layout of cgroups a mount table shows, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshbpf.agent.datapath.cgroups import CgroupLayout, cgroup_layout, layout_of
from meshbpf.agent.datapath.mounts import mounts_of

ROOT = "25 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
# Lines as mountinfo has them on Debian 12, on a hybrid machine, and in a container.
V2 = "29 25 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
V1 = "30 29 0:27 / /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory\n"
TMPFS = "29 25 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro\n"
UNIFIED = "31 29 0:28 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw\n"
PART = "28 25 0:28 /kubepods/podx /mnt/part rw,nosuid - cgroup2 cgroup2 rw\n"


def seen(tmp_path: Path, *lines: str, contained: bool = False) -> CgroupLayout:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "mountinfo").write_text(ROOT + "".join(lines))
    return layout_of(mounts_of(proc=tmp_path), contained=contained)


@pytest.mark.parametrize(
    ("lines", "contained", "kind", "point", "reason"),
    [
        ((V2,), False, "v2 alone", "/sys/fs/cgroup", "cgroup v2 alone at /sys/fs/cgroup"),
        (
            (TMPFS, V1, UNIFIED),
            False,
            "hybrid",
            "/sys/fs/cgroup/unified",
            "cgroup v2 beside v1 (hybrid) at /sys/fs/cgroup/unified",
        ),
        (
            (V2,),
            True,
            "v2 alone",
            "/sys/fs/cgroup",
            "cgroup v2 alone at /sys/fs/cgroup, the part that this container sees",
        ),
        (
            (TMPFS, V1),
            False,
            "v1 alone",
            None,
            "no cgroup v2 is mounted, cgroup v1 alone: connect hooks have nothing to sit on",
        ),
        ((), False, "none", None, "no cgroup v2 is mounted: connect hooks have nothing to sit on"),
    ],
    ids=["pure", "hybrid", "in a container", "version 1", "none"],
)
def test_each_layout_is_told_with_its_mount(
    tmp_path: Path,
    lines: tuple[str, ...],
    contained: bool,
    kind: str,
    point: str | None,
    reason: str,
) -> None:
    found = seen(tmp_path, *lines, contained=contained)
    assert (found.kind, found.point) == (kind, Path(point) if point else None)
    assert found.reason == reason


def test_the_hierarchys_root_counts_before_a_part_that_is_bound_elsewhere(tmp_path: Path) -> None:
    assert seen(tmp_path, PART, TMPFS, V1, UNIFIED).point == Path("/sys/fs/cgroup/unified")


def test_a_part_is_better_than_nothing(tmp_path: Path) -> None:
    assert seen(tmp_path, PART).point == Path("/mnt/part")


def test_this_machine_has_one_of_them() -> None:
    found = cgroup_layout()
    if found.point is not None:
        assert (found.point / "cgroup.procs").exists()
