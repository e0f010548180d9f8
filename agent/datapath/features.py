"""What this machine can do of what meshbpf wants, found by trying it.

Each feature carries the kernel that brought it and what its absence means to
a user: `meshbpf check` prints the table, `run` refuses to start over a
required one. A probe says "no" for any reason the kernel gives; a test fails
when it says so on a kernel that is new enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.datapath import bpffs, probes
from meshbpf.agent.datapath.build import toolchain_identity
from meshbpf.agent.datapath.cgroups import cgroup_layout
from meshbpf.agent.datapath.headers import locate_headers
from meshbpf.agent.datapath.mounts import mounted_kind, mounts_of


class MissingError(MeshbpfError):
    """Something that no system call asks for is not there."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One ability and, where it is missing, what that means."""

    name: str
    supported: bool
    required: bool
    least_kernel: tuple[int, int] | None  # None: not the kernel's doing
    consequence: str  # of its absence
    detail: str = ""  # why it is missing, and what helps

    @property
    def needs(self) -> str:
        """For people: what brings the feature."""
        if self.least_kernel is None:
            return self.detail.partition("\n")[0]
        return f"Linux {self.least_kernel[0]}.{self.least_kernel[1]}"


@dataclass(frozen=True, slots=True)
class _Probe:
    name: str
    attempt: Callable[[], object]
    required: bool
    least_kernel: tuple[int, int] | None
    consequence: str


_NO_CAPTURE = "no pod can be captured"

_PROBES = (
    _Probe("bpf", probes.bpf_call, True, (4, 4), _NO_CAPTURE),
    _Probe("connect hook", probes.connect_hook, False, (5, 18), "capture by TC alone"),
    _Probe("sk_lookup hook", probes.sk_lookup_hook, True, (5, 10), _NO_CAPTURE),
    _Probe("tc classifier", probes.tc_classifier, True, (5, 2), _NO_CAPTURE),
    _Probe(
        "tcx",
        probes.tcx,
        False,
        (6, 6),
        "TC programs are attached as clsact filters, which others may remove",
    ),
    _Probe(
        "socket storage",
        probes.socket_storage,
        True,
        (5, 10),  # 5.2 had it for TC; the connect hook came later, by this release
        "the agent's own sockets cannot be told from the pod's",
    ),
    _Probe("shared arrays", probes.shared_array, True, (5, 5), "no heartbeat for the hooks"),
    _Probe("prefix maps", probes.prefix_map, True, (4, 11), "no map of the mesh's prefixes"),
    _Probe("lru maps", probes.lru_map, True, (4, 10), "probes of the kubelet are captured"),
    _Probe("ring buffer", probes.ring_buffer, False, (5, 8), "no events from the kernel"),
    _Probe(
        "cgroup v2",
        lambda: _mounted("cgroup2", "mount -t cgroup2 none /sys/fs/cgroup/unified"),
        False,
        None,
        "capture by TC alone; the kubelet's probes are captured too",
    ),
    # Not mounted yet is well: `run` mounts it.
    _Probe("bpffs", bpffs.is_lasting, True, None, "capture would end with the agent"),
    _Probe("kernel headers", locate_headers, True, None, "the programs cannot be compiled"),
    _Probe("bcc", toolchain_identity, True, None, "the programs cannot be compiled"),
)


def probe() -> tuple[Feature, ...]:
    """Try everything; takes some milliseconds, changes nothing. Raises nothing."""
    return tuple(_run(item) for item in _PROBES)


def cgroup_reason() -> str:
    """Which layout of cgroups this machine has, and so which capture, for people."""
    return cgroup_layout().reason


def _run(item: _Probe) -> Feature:
    detail = ""
    try:
        item.attempt()
    except (MeshbpfError, OSError) as error:
        detail = str(error)
    return Feature(
        item.name, not detail, item.required, item.least_kernel, item.consequence, detail
    )


def _mounted(kind: str, hint: str) -> None:
    if mounted_kind(kind, mounts_of()) is None:
        raise MissingError(f"no-{kind}", f"no {kind} filesystem is mounted", hint)
