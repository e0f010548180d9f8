"""Which layout of cgroups a machine has, and where its version 2 hierarchy is.

Three occur. Version 2 alone is mounted at /sys/fs/cgroup. In the hybrid
layout version 1 has the controllers and version 2 lies beside them, at
/sys/fs/cgroup/unified under systemd. Without version 2 the connect hook has
nothing to sit on. A container (systemd-nspawn, a pod) sees its own part of the
hierarchy as the whole: a hook there runs for the processes in it, and TC
beneath catches the others. So the mount is looked for, never assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from meshbpf.agent.datapath.mounts import Mount, mounts_of

# The initial cgroup namespace's inode number (PROC_CGROUP_INIT_INO, linux/proc_ns.h).
_INITIAL_NAMESPACE = 0xEFFFFFFB


@dataclass(frozen=True, slots=True)
class CgroupLayout:
    """Where cgroup v2 is mounted, if it is, and beside what."""

    kind: Literal["v2 alone", "hybrid", "v1 alone", "none"]
    point: Path | None
    """Of version 2."""
    contained: bool
    """This process sees a part of the machine's hierarchy."""

    @property
    def reason(self) -> str:
        """Why connections are captured as they are, for people."""
        if self.point is None:
            beside = ", cgroup v1 alone" if self.kind == "v1 alone" else ""
            return f"no cgroup v2 is mounted{beside}: connect hooks have nothing to sit on"
        layout = "beside v1 (hybrid)" if self.kind == "hybrid" else "alone"
        part = ", the part that this container sees" if self.contained else ""
        return f"cgroup v2 {layout} at {self.point}{part}"


def cgroup_layout() -> CgroupLayout:
    """This process's. Raises OSError when /proc cannot be read."""
    namespace = Path("/proc/self/ns/cgroup").stat().st_ino
    return layout_of(mounts_of(), contained=namespace != _INITIAL_NAMESPACE)


def layout_of(mounts: tuple[Mount, ...], *, contained: bool) -> CgroupLayout:
    """The layout that `mounts` show.

    A hierarchy may be bound elsewhere in part: its own root counts before
    such a part, whichever was mounted first.
    """
    found = [mount for mount in mounts if mount.kind == "cgroup2"]
    whole = next((mount for mount in found if mount.root == "/"), found[0] if found else None)
    first = any(mount.kind == "cgroup" for mount in mounts)
    point = whole.point if whole is not None else None
    if point is None:
        return CgroupLayout("v1 alone" if first else "none", None, contained)
    return CgroupLayout("hybrid" if first else "v2 alone", point, contained)
