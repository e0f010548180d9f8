"""The BPF filesystem: mounted, and safe to pin in.

A pin keeps a program attached while no agent runs, which is what "fails
closed" rests on. But pins live exactly as long as the filesystem instance
does, and an instance ends with the last mount of it. `ip netns exec` and
`unshare -m` give a process a mount namespace of its own: a bpffs mounted
there is gone, with every pin, as soon as that process ends. So `ensure`
accepts a bpffs, or mounts one, only where PID 1 sees it too:

* we are in PID 1's mount namespace (a host, or a container with its init), or
* PID 1's namespace has the same instance mounted (a service with private
  mounts, a container on the host's PID namespace that was given /sys/fs/bpf).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from meshbpf.agent.core.errors import Exit, MeshbpfError
from meshbpf.agent.datapath import probes
from meshbpf.agent.datapath.mounts import Mount, mounted_at, mounts_of

MOUNT_POINT: Final = Path("/sys/fs/bpf")
PIN_ROOT: Final = MOUNT_POINT / "meshbpf"

_MS_NOSUID: Final = 2
_MS_NODEV: Final = 4
_MS_NOEXEC: Final = 8

_libc = ctypes.CDLL(None, use_errno=True)


class BpffsError(MeshbpfError):
    """No BPF filesystem in which pins would last."""

    exit_status = Exit.FAILED


def ensure(mount_point: Path = MOUNT_POINT) -> None:
    """Mount bpffs if it is missing. BpffsError when pins in it would not outlive this process.

    BpfError where bpf(2) is missing or forbidden: without it the mount would
    fail for reasons that say less.
    """
    probes.bpf_call()
    ours = mounts_of()
    if _check(ours, mount_point):
        return
    with _locked(mount_point):
        # Two agents that start together must not mount one over the other.
        if not _check(mounts_of(), mount_point):
            _mount(mount_point)


def is_lasting(mount_point: Path = MOUNT_POINT) -> bool:
    """Whether a bpffs is mounted whose pins last. BpffsError when one is or would be private."""
    return _check(mounts_of(), mount_point)


def _check(ours: tuple[Mount, ...], mount_point: Path) -> bool:
    try:
        theirs = mounts_of("1")
    except OSError as error:
        raise BpffsError(
            "bpffs-unknown",
            f"cannot tell whether pins would last: /proc/1/mountinfo: {error.strerror}",
            "run with the host's /proc",
        ) from error
    return is_mounted_lastingly(ours, theirs, mount_point)


def is_mounted_lastingly(
    ours: tuple[Mount, ...], init: tuple[Mount, ...], mount_point: Path
) -> bool:
    """The decision of `ensure`, from our mounts and PID 1's: False means "mount it".

    BpffsError when what is mounted, or would be, is private to this process.
    """
    present = mounted_at(mount_point, ours)
    mounted = present is not None and present.kind == "bpf"
    if {mount.id for mount in ours} & {mount.id for mount in init}:
        return mounted
    if present is not None and mounted:
        if any(mount.kind == "bpf" and mount.device == present.device for mount in init):
            return True
        raise BpffsError(
            "bpffs-private",
            f"the bpffs at {mount_point} is mounted only in this process's own mount namespace: "
            "its pins, and with them the capture of every pod, would vanish with the agent",
            _LEAVE_HINT,
        )
    raise BpffsError(
        "bpffs-private",
        f"no bpffs at {mount_point}, and one mounted now would be private to this process's own "
        "mount namespace: its pins, and with them the capture of every pod, would vanish with "
        "the agent",
        _LEAVE_HINT,
    )


_LEAVE_HINT: Final = (
    "start the agent in the host's mount namespace "
    "(`nsenter --net=/run/netns/NAME meshbpf run ...`, not `ip netns exec`), "
    "or mount the host's /sys/fs/bpf here"
)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise BpffsError(
            "bpffs-unsupported",
            f"{directory}: {error.strerror}",
            "mount sysfs at /sys; the kernel needs CONFIG_BPF_SYSCALL",
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _mount(mount_point: Path) -> None:
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    target = os.fsencode(mount_point)
    if _libc.mount(b"bpf", target, b"bpf", ctypes.c_ulong(flags), b"mode=0700") != 0:
        failure = ctypes.get_errno()
        raise BpffsError(
            "bpffs-mount",
            f"mount bpffs at {mount_point}: {os.strerror(failure)}",
            f"mount -t bpf bpf {mount_point}",
        )
