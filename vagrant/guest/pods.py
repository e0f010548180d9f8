"""What a kubelet would do on a node of the testbed: make its pods, by CRI.

    pods.py make           pods of this node that do not run are made (dead ones go first)
    pods.py remove NS/NAME
    pods.py netns NS/NAME  print the path of the pod's network namespace

Reads `pods.json` beside it. Runs with the Python of the meshbpf package, whose
gRPC client and CRI messages it borrows.
"""

from __future__ import annotations

import json
import socket
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import trio
from google.protobuf.message import Message

from meshbpf.agent.runtime.grpc_client import Channel, open_channel
from meshbpf.agent.wire import cri
from meshbpf.agent.wire.pb import cri_pb2

SOCKET = "/run/containerd/containerd.sock"
IMAGE = "meshbpf.local/server:1"
# An emulated machine takes seconds for what takes another one 0.1 s.
LIMIT_S = 120.0

M = TypeVar("M", bound=Message)


class Runtime:
    """The calls that make and remove a pod."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def _ask(self, method: str, request: Message, answer: type[M]) -> M:
        path = f"runtime.v1.RuntimeService/{method}"
        data = await self._channel.unary(path, request.SerializeToString(), timeout_s=LIMIT_S)
        made = answer()
        made.ParseFromString(data)
        return made

    async def sandboxes(self, namespace: str = "", name: str = "") -> list[cri_pb2.PodSandbox]:
        request = cri_pb2.ListPodSandboxRequest()
        answer = await self._ask("ListPodSandbox", request, cri_pb2.ListPodSandboxResponse)
        return [
            item
            for item in answer.items
            if not name or (item.metadata.namespace, item.metadata.name) == (namespace, name)
        ]

    async def make(self, namespace: str, name: str) -> None:
        """A sandbox and, in it, the server."""
        uid = str(uuid.uuid4())
        metadata = cri_pb2.PodSandboxMetadata(name=name, namespace=namespace, uid=uid, attempt=0)
        # With the systemd driver a pod's cgroup is a slice, called as the kubelet calls it.
        pod_slice = f"kubepods-besteffort-pod{uid.replace('-', '_')}.slice"
        cgroup = f"/kubepods.slice/kubepods-besteffort.slice/{pod_slice}"
        labels = {cri.POD_NAME_LABEL: name, cri.POD_NAMESPACE_LABEL: namespace}
        config = cri_pb2.PodSandboxConfig(
            metadata=metadata,
            hostname=name,
            labels=labels,
            log_directory=f"/var/log/pods/{name}",
            linux=cri_pb2.LinuxPodSandboxConfig(cgroup_parent=cgroup),
        )
        sandbox = await self._ask(
            "RunPodSandbox",
            cri_pb2.RunPodSandboxRequest(config=config),
            cri_pb2.RunPodSandboxResponse,
        )
        container = cri_pb2.ContainerConfig(
            metadata=cri_pb2.ContainerMetadata(name="server"),
            image=cri_pb2.ImageSpec(image=IMAGE),
            args=["serve", f"{namespace}/{name}"],
            log_path="server.log",
        )
        request = cri_pb2.CreateContainerRequest(
            pod_sandbox_id=sandbox.pod_sandbox_id, config=container, sandbox_config=config
        )
        made = await self._ask("CreateContainer", request, cri_pb2.CreateContainerResponse)
        await self._ask(
            "StartContainer",
            cri_pb2.StartContainerRequest(container_id=made.container_id),
            cri_pb2.StartContainerResponse,
        )

    async def remove(self, sandbox_id: str) -> None:
        await self._ask(
            "StopPodSandbox",
            cri_pb2.StopPodSandboxRequest(pod_sandbox_id=sandbox_id),
            cri_pb2.StopPodSandboxResponse,
        )
        await self._ask(
            "RemovePodSandbox",
            cri_pb2.RemovePodSandboxRequest(pod_sandbox_id=sandbox_id),
            cri_pb2.RemovePodSandboxResponse,
        )

    async def netns(self, sandbox_id: str) -> str:
        request = cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=sandbox_id, verbose=True)
        answer = await self._ask("PodSandboxStatus", request, cri_pb2.PodSandboxStatusResponse)
        spec = json.loads(answer.info["info"])["runtimeSpec"]["linux"]["namespaces"]
        return str(next(entry["path"] for entry in spec if entry["type"] == "network"))


@asynccontextmanager
async def runtime() -> AsyncIterator[Runtime]:
    stream = await trio.open_unix_socket(SOCKET)
    async with open_channel(stream, "localhost") as channel:
        yield Runtime(channel)


async def make() -> None:
    pods = json.loads(Path(__file__).with_name("pods.json").read_text())
    async with runtime() as cri_runtime:
        alive = set()
        for item in await cri_runtime.sandboxes():
            if item.state == cri_pb2.SANDBOX_READY:
                alive.add(f"{item.metadata.namespace}/{item.metadata.name}")
            else:
                await cri_runtime.remove(item.id)
        for key, pod in pods.items():
            if pod["node"] == socket.gethostname() and key not in alive:
                await cri_runtime.make(*key.split("/"))
                print("made", key)


async def remove(key: str) -> None:
    async with runtime() as cri_runtime:
        for item in await cri_runtime.sandboxes(*key.split("/")):
            await cri_runtime.remove(item.id)


async def netns(key: str) -> None:
    async with runtime() as cri_runtime:
        for item in await cri_runtime.sandboxes(*key.split("/")):
            if item.state == cri_pb2.SANDBOX_READY:
                print(await cri_runtime.netns(item.id))


if __name__ == "__main__":
    verb, *words = sys.argv[1:]
    verbs: dict[str, Callable[..., Awaitable[None]]] = {
        "make": make,
        "remove": remove,
        "netns": netns,
    }
    trio.run(verbs[verb], *words)
