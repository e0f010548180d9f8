"""Settings of the host's kernel that change how the agent does, read from /proc.

None of them is required: each finding is a warning that says what is lost.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from meshbpf.cli.checks.model import Category, Finding

# The agent asks for this backlog on each of a pod's listeners.
_BACKLOG = 4096
# A carried connection takes two descriptors, and a pod a dozen.
_OPEN_FILES = 65_536


@dataclass(frozen=True, slots=True)
class Sysctl:
    """A sysctl, what its value should satisfy, and what follows where it does not."""

    name: str
    wanted: Callable[[int], bool]
    consequence: str
    remedy: str

    def look(self, root: Path) -> Finding:
        """Read it below `root` (/proc/sys); one that this kernel lacks is no fault."""
        try:
            text = (root / self.name.replace(".", "/")).read_text().split()[0]
        except FileNotFoundError:
            return Finding(name=self.name, outcome="ok", found="not known to this kernel")
        except (PermissionError, IndexError) as error:
            return Finding(name=self.name, outcome="warning", found=f"cannot be read: {error}")
        if self.wanted(int(text)):
            return Finding(name=self.name, outcome="ok", found=text)
        return Finding(
            name=self.name,
            outcome="warning",
            found=text,
            consequence=self.consequence,
            hint=f"sysctl -w {self.name}={self.remedy}",
        )


SYSCTLS = (
    Sysctl(
        "net.ipv4.ip_forward",
        lambda value: value == 1,
        "this host does not route IPv4 between its pods and other nodes",
        "1",
    ),
    Sysctl(
        "net.ipv6.conf.all.forwarding",
        lambda value: value == 1,
        "this host does not route IPv6 between its pods and other nodes",
        "1",
    ),
    Sysctl(
        "net.ipv4.conf.all.rp_filter",
        lambda value: value != 1,
        "packets that come back by another interface than their answer would leave by are dropped: "
        "on nodes with several links pods lose connections",
        "2",
    ),
    Sysctl(
        "net.core.somaxconn",
        lambda value: value >= _BACKLOG,
        f"bursts of new connections beyond it are dropped, where the agent allows {_BACKLOG}",
        str(_BACKLOG),
    ),
    Sysctl(
        "net.core.bpf_jit_enable",
        lambda value: value >= 1,
        "BPF programs are interpreted: every packet of a captured pod costs more",
        "1",
    ),
    Sysctl(
        "kernel.unprivileged_bpf_disabled",
        lambda value: value >= 1,
        "every user of this host may load BPF programs: kernel bugs there are open to them",
        "1",
    ),
)


def settings(root: Path = Path("/proc/sys")) -> Category:
    """The sysctls and limits of this host."""
    return Category(
        name="host settings",
        findings=(*(sysctl.look(root) for sysctl in SYSCTLS), open_files(resource_limit())),
    )


def resource_limit() -> int:
    """The hard limit of open files, which the agent may raise its own to."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return _OPEN_FILES if hard == resource.RLIM_INFINITY else hard


def open_files(limit: int) -> Finding:
    """Whether `limit` open files carry a busy node."""
    if limit >= _OPEN_FILES:
        return Finding(name="open files", outcome="ok", found=f"{limit} or more")
    return Finding(
        name="open files",
        outcome="warning",
        found=f"at most {limit} here",
        consequence=f"an agent started from here carries about {max(limit // 2 - 64, 0)} "
        "connections at once",
        hint=f"ulimit -Hn {_OPEN_FILES}, or LimitNOFILE={_OPEN_FILES} in the agent's unit",
    )
