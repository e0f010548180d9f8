"""The container runtime on this node, asked by CRI over its unix socket."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import trio
from google.protobuf.message import DecodeError

from meshbpf.agent.runtime.grpc_client import Call, Channel, open_channel
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
# Docker's own containerd listens at the first of them with its CRI plugin off;
# what answers there says "unimplemented" and the next one is asked.
# A runtime that pulls images or starts many pods answers late; crictl's two
# seconds proved too short under load.
TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 16 * 1024 * 1024  # the kubelet's limit for CRI
_SERVICE = "runtime.v1.RuntimeService/"


@dataclass(frozen=True, slots=True)
class RuntimeVersion:
    """What the runtime calls itself."""

    name: str
    version: str


def find_sockets(
    override: Path | None = None, known: Sequence[Path] = KNOWN_SOCKETS
) -> tuple[Path, ...]:
    """The runtimes' sockets that are there. Raises CriError when there is none."""
    candidates = (override,) if override is not None else known
    found = tuple(path for path in candidates if _is_socket(path))
    if not found:
        raise CriError(
            "no-runtime",
            "no container runtime socket at " + ", ".join(str(path) for path in candidates),
            "start the runtime, name its socket with `meshbpf run --cri-socket`, or name the "
            "pod's network namespace with --netns",
        )
    return found


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.stat().st_mode)
    except OSError:
        return False


class CriClient:
    """Questions to the node's runtime; each `session` is one connection."""

    def __init__(self, override: Path | None = None, known: Sequence[Path] = KNOWN_SOCKETS) -> None:
        self._override = override
        self._known = known

    @asynccontextmanager
    async def session(self) -> AsyncIterator[CriSession]:
        """Connect. Raises CriError when no runtime answers."""
        *others, last = find_sockets(self._override, self._known)
        for path in others:
            if await _serves_cri(path):
                break
        else:
            path = last
        async with _connected(path) as session:
            yield session


async def _serves_cri(path: Path) -> bool:
    try:
        async with _connected(path) as session:
            await session.version()
    except CriError:
        return False
    return True


@asynccontextmanager
async def _connected(path: Path) -> AsyncIterator[CriSession]:
    try:
        stream = await trio.open_unix_socket(str(path))
    except OSError as error:
        raise CriError(
            "runtime-unreachable",
            f"cannot connect to the container runtime at {path}: {error}",
            "check that it runs (`systemctl status containerd`), or name its socket with "
            "`meshbpf run --cri-socket`",
        ) from error
    # What Go's clients send for unix sockets: an :authority with slashes
    # in it is refused by Go's servers.
    async with open_channel(stream, "localhost", max_message_bytes=MAX_ANSWER_BYTES) as channel:
        yield CriSession(path, channel)


class CriSession:
    """An open connection to the runtime."""

    def __init__(self, path: Path, channel: Channel) -> None:
        self._path = path
        self._channel = channel

    async def version(self) -> RuntimeVersion:
        """Which runtime this is."""
        data = await self._unary("Version", cri_pb2.VersionRequest(version="v1"))
        answer = _parsed(cri_pb2.VersionResponse, data)
        return RuntimeVersion(answer.runtime_name, answer.runtime_version)

    async def find(self, namespace: str, name: str) -> Sandbox:
        """The sandbox that is pod `namespace/name` now.

        Raises CriError: `unknown-pod`, `host-network`, `no-netns`.
        """
        data = await self._unary("ListPodSandbox", cri.list_request(namespace, name))
        found = cri.newest(_parsed(cri_pb2.ListPodSandboxResponse, data).items)
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
        return cri.sandbox(_parsed(cri_pb2.PodSandboxStatusResponse, data))

    async def ready_pods(self) -> dict[str, str]:
        """NS/NAME of every pod that runs on this node, with its sandbox's id."""
        data = await self._unary("ListPodSandbox", cri.ready_request())
        return cri.current(_parsed(cri_pb2.ListPodSandboxResponse, data))

    @asynccontextmanager
    async def events(self) -> AsyncIterator[Call]:
        """One message for each container that starts, stops or goes, as long as the block lasts.

        What they say is not read: each means "look again". Raises GrpcError
        UNIMPLEMENTED, from the call, on runtimes that have none (containerd
        before 1.7).
        """
        async with self._channel.call(_SERVICE + "GetContainerEvents") as call:
            await call.send(cri_pb2.GetEventsRequest().SerializeToString(), end=True)
            yield call

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
                    "enable the runtime's CRI plugin, or name another socket with `meshbpf run "
                    "--cri-socket`",
                ) from error
            raise CriError("cri-failed", f"{self._path}: {error}") from error


_Message = cri_pb2.VersionRequest | cri_pb2.ListPodSandboxRequest | cri_pb2.PodSandboxStatusRequest
_A = TypeVar(
    "_A",
    cri_pb2.VersionResponse,
    cri_pb2.ListPodSandboxResponse,
    cri_pb2.PodSandboxStatusResponse,
)


def _parsed(kind: type[_A], data: bytes) -> _A:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise CriError("bad-answer", f"the runtime's {kind.__name__} is none: {error}") from error
