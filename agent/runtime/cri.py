"""The container runtime on this node, asked by CRI over its unix socket."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from meshbpf.agent.runtime.grpc_client import Channel, open_channel
from meshbpf.agent.wire import cri
from meshbpf.agent.wire.cri import CriError, Sandbox
from meshbpf.agent.wire.grpc import GrpcError, Status
from meshbpf.agent.wire.pb import cri_pb2

# Where the runtimes put their sockets; the order decides when a node has two.
KNOWN_SOCKETS = (
    Path("/run/containerd/containerd.sock"),
    Path("/run/k3s/containerd/containerd.sock"),
    Path("/run/crio/crio.sock"),
    Path("/run/cri-dockerd.sock"),
)
# A runtime that pulls images or starts many pods answers late; crictl's two
# seconds proved too short under load.
TIMEOUT_S = 10.0

_SERVICE = "runtime.v1.RuntimeService/"


@dataclass(frozen=True, slots=True)
class RuntimeVersion:
    """What the runtime calls itself."""

    name: str
    version: str


def find_socket(override: Path | None = None, known: Sequence[Path] = KNOWN_SOCKETS) -> Path:
    """The runtime's socket. Raises CriError when there is none."""
    candidates = (override,) if override is not None else known
    for path in candidates:
        try:
            if stat.S_ISSOCK(path.stat().st_mode):
                return path
        except OSError:
            continue
    raise CriError(
        "no-runtime",
        "no container runtime socket at " + ", ".join(str(path) for path in candidates),
        "start the runtime, name its socket with --cri-socket, or name the pod's "
        "network namespace with --netns",
    )


class CriClient:
    """Questions to one runtime; each `session` is one connection."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @asynccontextmanager
    async def session(self) -> AsyncIterator[CriSession]:
        """Connect. Raises CriError when the runtime does not answer there."""
        try:
            stream = await trio.open_unix_socket(str(self.path))
        except OSError as error:
            raise CriError(
                "runtime-unreachable",
                f"cannot connect to the container runtime at {self.path}: {error}",
                "check that it runs (`systemctl status containerd`), or name its socket with "
                "--cri-socket",
            ) from error
        # What Go's clients send for unix sockets: an :authority with slashes
        # in it is refused by Go's servers.
        async with open_channel(stream, "localhost") as channel:
            yield CriSession(self.path, channel)


class CriSession:
    """An open connection to the runtime."""

    def __init__(self, path: Path, channel: Channel) -> None:
        self._path = path
        self._channel = channel

    async def version(self) -> RuntimeVersion:
        """Which runtime this is."""
        data = await self._unary("Version", cri_pb2.VersionRequest(version="v1"))
        answer = cri_pb2.VersionResponse.FromString(data)
        return RuntimeVersion(answer.runtime_name, answer.runtime_version)

    async def find(self, namespace: str, name: str) -> Sandbox:
        """The sandbox that is pod `namespace/name` now.

        Raises CriError: `unknown-pod`, `host-network`, `no-netns`.
        """
        data = await self._unary("ListPodSandbox", cri.list_request(namespace, name))
        found = cri.newest(cri_pb2.ListPodSandboxResponse.FromString(data))
        if found is None:
            raise CriError(
                "unknown-pod",
                f"{self._path} has no ready pod {namespace}/{name} on this node",
                "see which it has with `crictl pods --state ready`; a pod on another node is "
                "attached by that node's agent",
            )
        return await self.status(found.id)

    async def status(self, sandbox_id: str) -> Sandbox:
        """One sandbox by its id. Raises CriError as `find` does."""
        request = cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=sandbox_id, verbose=True)
        data = await self._unary("PodSandboxStatus", request)
        return cri.sandbox(cri_pb2.PodSandboxStatusResponse.FromString(data))

    async def find_container(self, container: str) -> Sandbox:
        """The sandbox of the container whose id starts with `container`.

        Raises CriError when none or several match.
        """
        request = cri_pb2.ListContainersRequest(filter=cri_pb2.ContainerFilter(id=container))
        data = await self._unary("ListContainers", request)
        found = cri_pb2.ListContainersResponse.FromString(data).containers
        if len(found) != 1:
            raise CriError(
                "unknown-container",
                f"{self._path} has {len(found)} containers with an id like {container!r}",
                "see `crictl ps`; give more of the id",
            )
        return await self.status(found[0].pod_sandbox_id)

    async def events(self) -> AsyncIterator[cri_pb2.ContainerEventResponse]:
        """Container events as they come, until the runtime ends them.

        Raises GrpcError UNIMPLEMENTED on runtimes without them (containerd
        before 1.7): watch the network namespaces instead.
        """
        method = _SERVICE + "GetContainerEvents"
        async with self._channel.call(method) as call:
            await call.send(cri_pb2.GetEventsRequest().SerializeToString(), end=True)
            while (message := await call.receive()) is not None:
                yield cri_pb2.ContainerEventResponse.FromString(message)

    async def _unary(self, method: str, request: _Message) -> bytes:
        try:
            return await self._channel.unary(
                _SERVICE + method, request.SerializeToString(), timeout_s=TIMEOUT_S
            )
        except GrpcError as error:
            if error.status is Status.UNIMPLEMENTED:
                raise CriError(
                    "no-cri",
                    f"{self._path} does not serve CRI v1 ({error})",
                    "enable the runtime's CRI plugin, or name another socket with --cri-socket",
                ) from error
            raise CriError("cri-failed", f"{self._path}: {error}") from error


_Message = (
    cri_pb2.VersionRequest
    | cri_pb2.ListPodSandboxRequest
    | cri_pb2.PodSandboxStatusRequest
    | cri_pb2.ListContainersRequest
)
