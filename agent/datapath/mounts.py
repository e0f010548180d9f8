"""What is mounted where, from /proc/PID/mountinfo (proc_pid_mountinfo(5)).

Mount ids are unique on the machine while the mount lives, and every mount
namespace has mounts of its own: two processes are in one namespace exactly
when they see a mount id in common. Unlike the links in /proc/PID/ns, this
file may be read of any process, also of a PID 1 that we may not trace.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_OCTAL: Final = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount as a process sees it; `device` is equal for all mounts of one filesystem."""

    id: int
    device: str  # MAJOR:MINOR
    point: Path
    kind: str  # proc, bpf, cgroup2, ...
    root: str = "/"  # what of the filesystem is seen: "/" is all of it


def mounts_of(process: str = "self", *, proc: Path = Path("/proc")) -> tuple[Mount, ...]:
    """Mounts under the root of process `process`, later ones on top. Raises OSError."""
    lines = (proc / process / "mountinfo").read_text().splitlines()
    return tuple(_parse(line) for line in lines)


def mounted_at(point: Path, mounts: tuple[Mount, ...]) -> Mount | None:
    """The topmost mount at exactly `point`."""
    return next((mount for mount in reversed(mounts) if mount.point == point), None)


def mounted_kind(kind: str, mounts: tuple[Mount, ...]) -> Mount | None:
    """The first mount of a filesystem type."""
    return next((mount for mount in mounts if mount.kind == kind), None)


def _parse(line: str) -> Mount:
    # 42 23 0:39 / /sys/fs/bpf rw,relatime shared:7 - bpf bpf rw
    before, _, after = line.partition(" - ")
    number, _, device, root, point = before.split(" ")[:5]
    plain = _OCTAL.sub(lambda code: chr(int(code[1], 8)), point)
    return Mount(int(number), device, Path(plain), after.split(" ")[0], root)
