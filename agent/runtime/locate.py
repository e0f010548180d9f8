"""Where a pod that is to be attached lives: its network namespace and what came with it.

By name the container runtime is asked (CRI). A namespace, a process or a
container that the caller names does without: then nothing vouches that it is
the pod's, but the caller.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from meshbpf.agent.api import AttachRequest
from meshbpf.agent.config import PodName
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.runtime import processes
from meshbpf.agent.runtime.attach_plan import AttachError, Located, find_netns
from meshbpf.agent.runtime.cri import CriClient, CriSession
from meshbpf.agent.wire.cri import Sandbox


class Locator:
    """Finds pods on this node."""

    def __init__(self, cri: CriClient) -> None:
        self._cri = cri

    async def locate(self, request: AttachRequest) -> Located:
        """Where the requested pod lives. Raises MeshbpfError."""
        given = [request.netns is not None, request.pid is not None, request.container is not None]
        if sum(given) > 1:
            raise AttachError(
                "two-places",
                "the pod's place is named in more than one way",
                "give one of --netns, --pid and --container, or none of them",
            )
        if request.netns is not None:
            return Located(find_netns(request.netns))
        if request.pid is not None:
            return await trio.to_thread.run_sync(_of_process, request.pid)
        if request.container is not None:
            return await trio.to_thread.run_sync(_of_container, request.container)
        name = PodName.parse(request.pod)
        async with self._cri.session() as session:
            sandbox = await session.find(name.namespace, name.name)
        return await trio.to_thread.run_sync(of_sandbox, sandbox)

    @asynccontextmanager
    async def session(self) -> AsyncIterator[CriSession]:
        """A connection to the runtime, for whoever follows its pods."""
        async with self._cri.session() as session:
            yield session


def of_sandbox(sandbox: Sandbox) -> Located:
    """Where a sandbox lives, as seen from here. Blocking; raises MeshbpfError.

    The namespace's own file is taken where we can see it, because it lives as
    long as the pod. Runtimes that name none (cri-dockerd), or in a mount
    namespace that we do not share, leave the sandbox's first process.
    """
    pid = sandbox.pid or _process_of(sandbox)
    path = Path(sandbox.netns) if sandbox.netns else None
    if path is None or not path.exists():
        if not pid:
            raise AttachError(
                "no-netns",
                f"the runtime does not say which network namespace pod {sandbox.namespace}/"
                f"{sandbox.name} has",
                "name it yourself with --netns PATH, or --pid PID of a process in the pod",
            )
        path = processes.netns_of(pid)
    return Located(
        netns=find_netns(str(path)),
        sandbox=sandbox.id,
        uid=sandbox.uid,
        cgroup=processes.cgroup_of(pid) if pid else "",
        addresses=frozenset(sandbox.addresses),
    )


def _process_of(sandbox: Sandbox) -> int:
    """Where the runtime does not say the pid: the process in the sandbox's own cgroup."""
    try:
        return processes.container_process(sandbox.id)
    except MeshbpfError:
        return 0


def _of_process(pid: int) -> Located:
    return Located(netns=find_netns(str(processes.netns_of(pid))), cgroup=processes.cgroup_of(pid))


def _of_container(container: str) -> Located:
    return _of_process(processes.container_process(container))
