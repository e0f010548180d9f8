"""The agent's side of the CNI plugin (packaging/cni/meshbpf-cni.c).

A pod is attached while the runtime waits, before its first process runs: no
packet of it is ever uncaptured, and when it cannot be attached it does not
start. What CNI attached, CNI removes: by container id, never by the pod's
name, which its successor may bear already.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec
import trio

from meshbpf.agent.api import AttachRequest
from meshbpf.agent.api_cni import CniRequest, CniResult
from meshbpf.agent.config import PodName
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.runtime.attach_plan import Located, find_netns
from meshbpf.agent.runtime.attachments import Attachment
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.runtime.membership import Membership
from meshbpf.agent.runtime.pods import PodManager

MAX_CLIENTS = 256
"""A node starts all of its pods at once when it boots; the kubelet's limit is 110."""
MAX_REQUEST_BYTES = 2 * 1024 * 1024
"""As the plugin's own; a GC names every pod of the node."""

log = Log("cni")


class CniError(MeshbpfError):
    """What the plugin is answered, and the runtime tells."""


class _Attachment(msgspec.Struct, frozen=True, rename={"container": "containerID"}):
    container: str


class _Config(msgspec.Struct, frozen=True, rename={"valid": "cni.dev/valid-attachments"}):
    valid: tuple[_Attachment, ...] | None = None


@dataclass(frozen=True, slots=True)
class CniStatistics:
    """Counters since the start."""

    enrolled: int
    left_alone: int
    removed: int
    refused: int


class Announcer(Protocol):
    """Tells others of a pod that is captured."""

    async def announce(self, name: PodName) -> None:
        """Before the pod starts; must not take long, and raises nothing."""


class CniService:
    """Answers the plugin's calls."""

    def __init__(
        self,
        membership: Membership,
        pods: Callable[[], Awaitable[PodManager]],
        pending: Callable[[], tuple[str, ...]],
        announcer: Announcer | None = None,
    ) -> None:
        self._announcer = announcer
        self._membership = membership
        self._pods = pods
        self._pending = pending
        self._enrolled = self._left_alone = self._removed = self._refused = 0

    def statistics(self) -> CniStatistics:
        """Counters since the start."""
        return CniStatistics(self._enrolled, self._left_alone, self._removed, self._refused)

    async def handle(self, request: CniRequest) -> CniResult:
        """One call. Raises MeshbpfError with what the runtime is to tell."""
        try:
            match request.command:
                case "ADD":
                    return await self._add(request)
                case "DEL":
                    return await self._del(request)
                case "CHECK":
                    return await self._check(request)
                case "GC":
                    return await self._gc(request)
                case "STATUS":
                    return self._status()
        except MeshbpfError as error:
            self._refused += 1
            log.warning("refused", command=request.command, args=request.arguments, cause=error)
            raise

    async def _add(self, request: CniRequest) -> CniResult:
        name = pod_of(request.arguments)
        member = await self._membership.of(name)
        if member is None:
            self._left_alone += 1
            return CniResult(outcome="not-enrolled", pod=str(name))
        pods = await self._pods()
        where = Located(await trio.to_thread.run_sync(find_netns, request.netns))
        wanted = AttachRequest(pod=str(name), service_account=member.account)
        await pods.enrol(wanted, where, request.container)
        if self._announcer is not None:
            await self._announcer.announce(name)
        self._enrolled += 1
        return CniResult(outcome="enrolled", pod=str(name))

    async def _del(self, request: CniRequest) -> CniResult:
        pods = await self._pods()
        gone = await pods.release(lambda one: _is(one, request.container))
        self._removed += len(gone)
        return CniResult(outcome="removed" if gone else "nothing-to-do", pod=",".join(gone))

    async def _check(self, request: CniRequest) -> CniResult:
        name = pod_of(request.arguments)
        if await self._membership.of(name) is None:
            return CniResult(outcome="not-enrolled", pod=str(name))
        for pod in (await self._pods()).list():
            if _is(pod.attachment, request.container):
                if pod.state != "attached":
                    raise CniError("not-attached", f"pod {name}: {pod.reason or pod.state}")
                return CniResult(outcome="enrolled", pod=str(name))
        raise CniError(
            "not-attached",
            f"pod {name} belongs into the mesh, and its traffic is not steered",
            "delete the pod: its successor is enrolled when it starts",
        )

    async def _gc(self, request: CniRequest) -> CniResult:
        try:
            config = msgspec.json.decode(request.config, type=_Config)
        except msgspec.DecodeError as error:
            raise CniError(
                "bad-config", f"the network configuration cannot be read: {error}"
            ) from error
        if config.valid is None:
            raise CniError("bad-config", "GC without cni.dev/valid-attachments")
        valid = {one.container for one in config.valid}
        pods = await self._pods()
        gone = await pods.release(lambda one: bool(one.container) and one.container not in valid)
        self._removed += len(gone)
        return CniResult(outcome="removed" if gone else "nothing-to-do", pod=",".join(gone))

    def _status(self) -> CniResult:
        pending = self._pending()
        if pending:
            raise CniError("not-ready", f"the agent is not ready, waiting for {', '.join(pending)}")
        return CniResult(outcome="ready")


def _is(attachment: Attachment, container: str) -> bool:
    """Whether CNI attached it, as this container."""
    return bool(container) and attachment.container == container


def pod_of(arguments: str) -> PodName:
    """The pod that CNI_ARGS names. Raises ConfigError when it names none that can be."""
    pairs = dict(part.partition("=")[::2] for part in arguments.split(";"))
    return PodName.parse(f"{pairs.get('K8S_POD_NAMESPACE', '')}/{pairs.get('K8S_POD_NAME', '')}")
