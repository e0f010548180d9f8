"""Asking a container runtime, and following its pods, against a runtime that does as it is told.

It speaks gRPC as a real one does (tests/containerd has the real one) and has
what containerd 1.6 lacks: events, several runtimes on one node, and faults.
"""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
import trio

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.runtime import named_pods
from meshbpf.agent.runtime.attach_plan import Located
from meshbpf.agent.runtime.cri import CriClient, find_sockets
from meshbpf.agent.runtime.locate import Locator
from meshbpf.agent.runtime.named_pods import NamedPods
from meshbpf.agent.runtime.pods import PodManager
from meshbpf.agent.wire import cri
from meshbpf.agent.wire.pb import cri_pb2

from .grpc_server import Handler, Server, ServerCall, serving

SERVICE = "runtime.v1.RuntimeService/"


async def unimplemented(call: ServerCall) -> None:
    await call.end(
        *((":status", "200"), ("content-type", "application/grpc")),
        *(("grpc-status", "12"), ("grpc-message", "unknown service runtime.v1.RuntimeService")),
    )


@dataclass(slots=True)
class Runtime:
    """Pods by name with the id of their sandbox, and whether there are events."""

    pods: dict[str, str] = field(default_factory=dict)
    with_events: bool = False
    asked: int = 0
    stirred: trio.Event = field(default_factory=trio.Event)
    broken: bool = False

    def stir(self) -> None:
        self.stirred.set()
        self.stirred = trio.Event()

    def handlers(self) -> dict[str, Handler]:
        return {
            SERVICE + "Version": self.version,
            SERVICE + "ListPodSandbox": self.list,
            SERVICE + "PodSandboxStatus": self.status,
            SERVICE + "GetContainerEvents": self.events if self.with_events else unimplemented,
        }

    async def version(self, call: ServerCall) -> None:
        answer = cri_pb2.VersionResponse(runtime_name="told", runtime_version="1")
        await call.answer(answer.SerializeToString())

    async def list(self, call: ServerCall) -> None:
        wanted = cri_pb2.ListPodSandboxRequest.FromString(await call.request()).filter
        self.asked += 1
        if self.broken:
            await call.answer(b"\xff\xff")
            return
        items = []
        for key, sandbox in self.pods.items():
            namespace, _, name = key.partition("/")
            labels = {cri.POD_NAMESPACE_LABEL: namespace, cri.POD_NAME_LABEL: name}
            if all(labels.get(k) == v for k, v in wanted.label_selector.items()):
                items.append(cri_pb2.PodSandbox(id=sandbox, labels=labels))
        await call.answer(cri_pb2.ListPodSandboxResponse(items=items).SerializeToString())

    async def status(self, call: ServerCall) -> None:
        request = cri_pb2.PodSandboxStatusRequest.FromString(await call.request())
        key = next(key for key, one in self.pods.items() if one == request.pod_sandbox_id)
        namespace, _, name = key.partition("/")
        answer = cri_pb2.PodSandboxStatusResponse(
            status=cri_pb2.PodSandboxStatus(
                id=request.pod_sandbox_id,
                metadata=cri_pb2.PodSandboxMetadata(name=name, namespace=namespace, uid="u"),
                network=cri_pb2.PodSandboxNetworkStatus(ip="198.18.64.3"),
            ),
            info={"info": json.dumps({"pid": PID})},
        )
        await call.answer(answer.SerializeToString())

    async def events(self, call: ServerCall) -> None:
        await call.start()
        while True:
            await self.stirred.wait()
            await call.send(cri_pb2.ContainerEventResponse(container_id="c").SerializeToString())


PID = 0
"""A process with a network namespace of its own; set by the fixture."""


@pytest.fixture
def _process() -> Iterator[None]:
    global PID
    child = subprocess.Popen(["unshare", "--net", "sleep", "60"])
    own = Path("/proc/self/ns/net").stat().st_ino
    while Path(f"/proc/{child.pid}/ns/net").stat().st_ino == own:
        assert child.poll() is None
    PID = child.pid
    yield
    child.kill()
    child.wait()


@asynccontextmanager
async def running(
    tmp_path: Path, runtime: Runtime, name: str = "s"
) -> AsyncIterator[tuple[CriClient, Server]]:
    with trio.fail_after(20):
        async with serving(tmp_path / name, runtime.handlers()) as server:
            yield CriClient(tmp_path / name), server


# --- which runtime ----------------------------------------------------------


def test_no_socket_is_said_with_every_place_that_was_looked_at(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MeshbpfError, match="no container runtime socket at") as caught:
        find_sockets(known=(tmp_path / "file", tmp_path / "nothing"))
    assert f"{tmp_path}/file, {tmp_path}/nothing" in caught.value.what
    assert caught.value.code == "no-runtime"


async def test_a_socket_that_nobody_serves_is_said(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
    with pytest.raises(MeshbpfError, match="cannot connect to the container runtime") as caught:
        async with CriClient(tmp_path / "s").session():
            pytest.fail("no session can be")
    assert caught.value.code == "runtime-unreachable"


async def test_a_runtime_without_cri_is_passed_over_for_one_with(tmp_path: Path) -> None:
    async with (
        serving(tmp_path / "docker", {SERVICE + "Version": unimplemented}),
        running(tmp_path, Runtime(), "crio"),
    ):
        client = CriClient(known=(tmp_path / "no", tmp_path / "docker", tmp_path / "crio"))
        async with client.session() as session:
            assert (await session.version()).name == "told"


async def test_a_runtime_without_cri_says_so_when_it_is_the_only_one(tmp_path: Path) -> None:
    handlers = {SERVICE + "ListPodSandbox": unimplemented}
    async with (
        serving(tmp_path / "s", cast("dict[str, Handler]", handlers)),
        CriClient(tmp_path / "s").session() as session,
    ):
        with pytest.raises(MeshbpfError, match="does not serve CRI v1"):
            await session.ready_pods()


async def test_an_answer_that_is_no_message_is_refused(tmp_path: Path) -> None:
    async with (
        running(tmp_path, Runtime(broken=True)) as (client, _),
        client.session() as session,
    ):
        with pytest.raises(MeshbpfError, match="ListPodSandboxResponse is none"):
            await session.ready_pods()


# --- following --------------------------------------------------------------


class Manager:
    """Stands for PodManager: what it is told, and the pods that it has by name."""

    def __init__(self, **pods: str) -> None:
        self.pods = {f"web/{name}": sandbox for name, sandbox in pods.items()}
        self.told: list[str] = []

    def named(self) -> dict[str, str]:
        return dict(self.pods)

    async def lost(self, key: str, sandbox: str) -> None:
        self.told.append(f"lost {key}")
        self.pods[key] = ""

    async def found(self, key: str, where: Located) -> None:
        self.told.append(f"found {key} {where.sandbox}")
        self.pods[key] = where.sandbox


@asynccontextmanager
async def following(client: CriClient, manager: Manager) -> AsyncIterator[None]:
    follower = NamedPods(cast("PodManager", manager), Locator(client))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follower.run)
        yield
        nursery.cancel_scope.cancel()


async def until(told: list[str], *wanted: str, limit_s: float = 5.0) -> None:
    with trio.fail_after(limit_s):
        while told != list(wanted):  # noqa: ASYNC110 (the manager has no event)
            await trio.sleep(0.01)


@pytest.mark.root
@pytest.mark.usefixtures("_process")
async def test_a_pod_that_ends_and_its_successor_are_told(tmp_path: Path) -> None:
    runtime, manager = Runtime({"web/a": "1"}), Manager(a="1", b="")
    async with running(tmp_path, runtime) as (client, _), following(client, manager):
        await trio.sleep(0.2)
        assert manager.told == []
        runtime.pods = {"web/b": "2", "web/other": "3"}
        await until(manager.told, "lost web/a", "found web/b 2")


@pytest.mark.root
@pytest.mark.usefixtures("_process")
async def test_an_event_is_followed_by_a_look_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named_pods, "POLL_S", 30.0)
    runtime, manager = Runtime({}, with_events=True), Manager(a="")
    async with running(tmp_path, runtime) as (client, _), following(client, manager):
        await trio.sleep(0.3)
        runtime.pods = {"web/a": "1"}
        await trio.sleep(0.2)
        assert manager.told == []
        runtime.stir()
        await until(manager.told, "found web/a 1", limit_s=2.0)


@pytest.mark.root
@pytest.mark.usefixtures("_process")
async def test_a_runtime_that_is_away_says_nothing_about_its_pods(tmp_path: Path) -> None:
    runtime, manager = Runtime({"web/a": "1"}), Manager(a="1")
    async with following(CriClient(tmp_path / "s"), manager):
        async with running(tmp_path, runtime):
            while not runtime.asked:  # noqa: ASYNC110 (a plain counter)
                await trio.sleep(0.01)
        await trio.sleep(1.0)
        assert manager.told == []
        runtime.pods = {"web/a": "2"}
        async with running(tmp_path, runtime):
            await until(manager.told, "found web/a 2", limit_s=8.0)


@pytest.mark.root
@pytest.mark.usefixtures("_process")
async def test_a_runtime_that_answers_nonsense_is_asked_again(tmp_path: Path) -> None:
    runtime, manager = Runtime({}, broken=True), Manager(a="1")
    async with running(tmp_path, runtime) as (client, _), following(client, manager):
        while runtime.asked < 2:  # noqa: ASYNC110 (a plain counter)
            await trio.sleep(0.01)
        assert manager.told == []
        runtime.broken = False
        await until(manager.told, "lost web/a", limit_s=8.0)


async def test_nobody_is_asked_while_nobody_is_followed(tmp_path: Path) -> None:
    runtime = Runtime({"web/a": "1"})
    async with running(tmp_path, runtime) as (client, server), following(client, Manager()):
        await trio.sleep(0.3)
        assert (runtime.asked, server.connections) == (0, [])
