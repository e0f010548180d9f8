"""What /proc says of a pod's processes: their cgroup and their network namespace.

Both cgroup drivers and every layout (pure v2, hybrid, a container's own view)
are read in one way: the line `0::PATH` of /proc/PID/cgroup is the process's
place in the v2 hierarchy. The runtime's own `cgroupsPath` is not used: with
the systemd driver it is not even a path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from meshbpf.agent.core.errors import MeshbpfError

PROC = Path("/proc")
_CONTAINER_ID = re.compile(r"[0-9a-f]{12,64}")


class ProcessError(MeshbpfError):
    """No process, or not one process's namespace, answers to what was named."""


def cgroup_of(pid: int, proc: Path = PROC) -> str:
    """The process's cgroup v2 path below the mount; empty without v2, or when it is gone."""
    for hierarchy, _controllers, path in _cgroups(proc / str(pid)):
        if hierarchy == "0":
            return path
    return ""


def netns_of(pid: int, proc: Path = PROC) -> Path:
    """Path of the network namespace of a process that runs. Raises ProcessError."""
    path = proc / str(pid) / "ns" / "net"
    try:
        path.stat()
    except OSError as error:
        raise ProcessError(
            "no-process",
            f"process {pid}: {error.strerror}",
            "give the id of a process in the pod, as the agent's host sees it",
        ) from error
    return path


def container_process(container: str, proc: Path = PROC) -> int:
    """A process of the container whose id begins with `container`.

    Found by its cgroup's name, which every runtime makes of the full id, so
    no runtime has to be asked. Raises ProcessError when there is none, when
    the id is no id, or when it fits more than one container.
    """
    if not _CONTAINER_ID.fullmatch(container):
        raise ProcessError(
            "bad-container",
            f"{container!r} is not a container's id",
            "give 12 to 64 hexadecimal digits, as `crictl ps` shows them",
        )
    found: dict[str, int] = {}
    for process in _processes(proc):
        for identity in _container_ids(process):
            if identity.startswith(container):
                known = found.get(identity)
                pid = int(process.name)
                found[identity] = pid if known is None else min(known, pid)
    if not found:
        raise ProcessError(
            "unknown-container",
            f"no process of this host is in a container {container}",
            "see `crictl ps`; a container on another node is attached by that node's agent",
        )
    if len(found) > 1:
        raise ProcessError(
            "ambiguous-container",
            f"{container} fits {len(found)} containers: {', '.join(sorted(found))}",
            "give more of the id",
        )
    return next(iter(found.values()))


def _processes(proc: Path) -> Iterator[Path]:
    with os.scandir(proc) as entries:
        for entry in entries:
            if entry.name.isdigit():
                yield proc / entry.name


def _container_ids(process: Path) -> Iterator[str]:
    """Ids in the last part of its cgroups: ID, docker-ID.scope, cri-containerd-ID.scope, ...

    A container may make cgroups below its own, so every part of the path
    counts. A process that watches a container from outside (CRI-O's conmon)
    has the id in its cgroup too and is not of it.
    """
    seen: set[str] = set()
    for _hierarchy, _controllers, path in _cgroups(process):
        for part in path.split("/"):
            if "conmon" in part:
                break
            identity = part.removesuffix(".scope").rpartition("-")[2].rpartition(":")[2]
            if len(identity) == 64 and _CONTAINER_ID.fullmatch(identity):
                seen.add(identity)
    yield from seen


def _cgroups(process: Path) -> Iterator[tuple[str, str, str]]:
    """Hierarchy, controllers and path of each line of /proc/PID/cgroup."""
    try:
        text = (process / "cgroup").read_text()
    except OSError:
        return  # it ended while we looked
    for line in text.splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        yield hierarchy, controllers, path
