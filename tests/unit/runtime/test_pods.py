"""Pods: the order of steps, what failures leave behind, and taking over.

Namespaces, sockets, certificates and the record on disk are real; the kernel
side is a recorder that can be told to fail, which no real one does on demand
(tests/netns has the real one).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from meshbpf.agent import ca_files
from meshbpf.agent.api import AttachRequest, AttachResult, PodInfo
from meshbpf.agent.config import Settings
from meshbpf.agent.core.errors import ConfigError, MeshbpfError
from meshbpf.agent.core.state import MeshState
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import TunnelProtocol, Workload
from meshbpf.agent.datapath.steering import (
    AttachedPod,
    Listeners,
    OnAgentDown,
    PodSteering,
    Role,
    Steering,
)
from meshbpf.agent.runtime import pod as pod_module
from meshbpf.agent.runtime import pods as pods_module
from meshbpf.agent.runtime import reports
from meshbpf.agent.runtime.certs import CertificateStore
from meshbpf.agent.runtime.cri import CriClient
from meshbpf.agent.runtime.embedded_issuer import EmbeddedIssuer
from meshbpf.agent.runtime.fd_store import FdStore
from meshbpf.agent.runtime.local_pod import LocalPod
from meshbpf.agent.runtime.locate import Locator
from meshbpf.agent.runtime.notify import Notifier
from meshbpf.agent.runtime.pods import PodManager

pytestmark = [pytest.mark.root, pytest.mark.netns]

TAG = f"apunit{os.getpid()}"


@pytest.fixture
def netns() -> Iterator[Callable[[str], Path]]:
    """Makes namespaces by name; all are gone at the end."""
    made: list[str] = []

    def make(name: str) -> Path:
        full = f"{TAG}-{name}"
        if (Path("/run/netns") / full).exists():  # a killed run has left it
            subprocess.run(["ip", "netns", "del", full], check=True)
        subprocess.run(["ip", "netns", "add", full], check=True)
        made.append(full)
        subprocess.run(["ip", "-n", full, "link", "set", "lo", "up"], check=True)
        return Path("/run/netns") / full

    yield make
    for full in made:
        if (Path("/run/netns") / full).exists():
            subprocess.run(["ip", "netns", "del", full], check=True)


class Kernel:
    """Stands for Steering."""

    def __init__(self) -> None:
        self.pods: dict[str, AttachedPod] = {}
        self.listeners: dict[str, Listeners] = {}
        self.specs: dict[str, PodSteering] = {}
        self.calls: list[str] = []
        self.attach_error: Exception | None = None
        self.prepare_error: MeshbpfError | None = None
        self.prepared = 0
        self.detach_error: MeshbpfError | None = None

    def attach(self, pod: PodSteering, listeners: Listeners) -> AttachedPod:
        self.calls.append(f"attach {pod.key}")
        if self.attach_error is not None:
            raise self.attach_error
        assert all(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            for (role, _), sock in listeners.items()
            if role is not Role.DNS_UDP
        )
        attached = AttachedPod(
            index=1,
            key=pod.key,
            cookie=pod.netns.cookie,
            addresses=(ip_address("198.18.1.1"),),
            interfaces=("eth0",),
            host_ifindexes=(),
            host_skipped=(),
            on_agent_down=OnAgentDown(pod.on_agent_down),
        )
        self.pods[pod.key] = attached
        self.listeners[pod.key] = listeners
        self.specs[pod.key] = pod
        return attached

    def prepare(self) -> None:
        self.prepared += 1
        if self.prepare_error is not None:
            raise self.prepare_error

    def detach(self, key: str) -> None:
        self.calls.append(f"detach {key}")
        if self.detach_error is not None:
            raise self.detach_error
        self.pods.pop(key, None)

    def attached(self) -> tuple[AttachedPod, ...]:
        return tuple(self.pods.values())

    def set_listeners(self, key: str, listeners: Listeners) -> None:
        self.calls.append(f"set_listeners {key}")
        self.listeners[key] = listeners

    def protect(self, sock: socket.socket) -> None:
        assert sock.fileno() >= 0

    def own_sockets_map(self) -> int:
        raise NotImplementedError


class Server:
    """Stands for the forwarder: serves until cancelled, or fails when told."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls
        self.serving: list[str] = []
        self.started = 0
        self.fails = 0

    async def serve(self, pod: LocalPod, listeners: Listeners) -> None:
        self.started += 1
        if self.fails:
            self.fails -= 1
            raise ZeroDivisionError("a fault of ours")
        assert {role for role, _ in listeners} == set(Role)
        self.serving.append(f"{pod.key} as {pod.service_account}")
        try:
            await trio.sleep_forever()
        finally:
            self.serving.remove(f"{pod.key} as {pod.service_account}")

    def drain(self, pods: Iterable[str] | None = None) -> None:
        self.calls += [f"drain {key}" for key in pods or ()]


def workload(name: str, account: str) -> Workload:
    return Workload(
        uid=f"cluster//Pod/web/{name}",
        name=name,
        namespace="web",
        service_account=account,
        addresses=(ip_address("198.18.1.1"),),
        tunnel_protocol=TunnelProtocol.HBONE,
    )


class Node:
    """One agent's pods with everything around them."""

    def __init__(self, directory: Path, kernel: Kernel, nursery: trio.Nursery) -> None:
        self.kernel = kernel
        self.server = Server(kernel.calls)
        self.path = directory / "attachments.json"
        self.mesh = Snapshot.of(MeshState((workload("a", "shop"), workload("b", "stock"))), 1)
        folder = Path("/nowhere")
        settings = Settings(node="n", state_dir=folder, ca_dir=folder, local_xds=folder)
        if not (directory / "ca").exists():  # the next agent on it finds it there
            ca_files.init(directory / "ca", "cluster.local", datetime.now(UTC))
        self.certificates = CertificateStore(
            EmbeddedIssuer(directory / "ca"), nursery, ttl=timedelta(hours=1)
        )
        self.pods = PodManager(
            settings,
            self.path,
            steering=cast("Steering", kernel),
            certificates=self.certificates,
            server=self.server,
            mesh=lambda: self.mesh,
            nursery=nursery,
            store=FdStore(Notifier(None, None), {}),
            locator=Locator(CriClient(Path("/nowhere/cri.sock"))),
        )

    async def attach(self, name: str, netns: Path, **given: Any) -> AttachResult:
        request = AttachRequest(pod=f"web/{name}", netns=str(netns), **given)
        result = await self.pods.attach(request, self.describe)
        await trio.testing.wait_all_tasks_blocked()
        return result

    def describe(self, pod: pod_module.Pod) -> PodInfo:
        return reports.pod_info(pod, self.mesh, 0)

    def recorded(self) -> list[str]:
        if not self.path.exists():
            return []
        return [one["pod"] for one in json.loads(self.path.read_text())["attachments"]]

    def identities(self) -> list[str]:
        return [cert.identity.rpartition("/")[2] for cert in self.certificates.describe().certs]

    def states(self) -> dict[str, str]:
        return {pod.key: self.describe(pod).state for pod in self.pods.list()}

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(10):
            while not condition():  # noqa: ASYNC110 (it has no event)
                await trio.sleep(0.02)


@asynccontextmanager
async def node(directory: Path, kernel: Kernel | None = None) -> AsyncIterator[Node]:
    """Runs until the block ends; the record and the capture stay."""
    async with trio.open_nursery() as nursery:
        it = Node(directory, kernel or Kernel(), nursery)
        try:
            await it.pods.restore()
            nursery.start_soon(it.pods.watch)
            yield it
        finally:
            with trio.CancelScope(shield=True):
                await it.pods.stop_serving()
            nursery.cancel_scope.cancel()


def namespaces_held() -> int:
    """How many network namespaces this process has a descriptor of."""
    held, nsfs = 0, os.stat("/proc/self/ns/net").st_dev
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            held += fd.stat().st_dev == nsfs
    return held


@pytest.fixture(autouse=True)
def _swift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pods_module, "WATCH_S", 0.05)
    monkeypatch.setattr(pods_module, "RETRY_S", 0.1)
    monkeypatch.setattr(pod_module, "SERVE_RETRY_S", 0.05)


async def test_an_attached_pod_is_served_recorded_and_has_a_certificate(
    tmp_path: Path, netns: Callable[[str], Path]
) -> None:
    async with node(tmp_path) as it:
        result = await it.attach("a", netns("a"))
        assert result.outcome == "attached"
        assert result.pod.identity == "spiffe://cluster.local/ns/web/sa/shop"
        assert result.pod.workload == "cluster//Pod/web/a"
        assert it.server.serving == ["web/a as shop"]
        assert it.recorded() == ["web/a"]
        assert it.identities() == ["shop"]


async def test_each_attach_has_programs_loaded_for_the_next_one(
    tmp_path: Path, netns: Callable[[str], Path]
) -> None:
    async with node(tmp_path) as it:
        it.kernel.prepare_error = MeshbpfError("bpf", "no memory")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.pods.watch)
            for name in ("a", "b"):
                before = it.kernel.prepared
                # That it failed before keeps no pod from being attached.
                assert (await it.attach(name, netns(name))).outcome == "attached"
                with trio.fail_after(5):
                    while it.kernel.prepared == before:  # noqa: ASYNC110 (another thread counts)
                        await trio.sleep(0.01)
            nursery.cancel_scope.cancel()


async def test_an_attach_that_cannot_be_written_down_is_undone(
    tmp_path: Path, netns: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with node(tmp_path) as it:
        path = netns("a")
        with monkeypatch.context() as patch:
            patch.setattr("meshbpf.agent.runtime.attachments.save", full)
            with pytest.raises(MeshbpfError, match="not attached") as caught:
                await it.attach("a", path)
        assert caught.value.code == "attachments-not-saved"
        assert (it.states(), it.server.serving, it.kernel.pods) == ({}, [], {})
        assert (await it.attach("a", path)).outcome == "attached"


@pytest.mark.compat
async def test_peers_are_told_before_the_capture_is_lifted(
    tmp_path: Path, netns: Callable[[str], Path]
) -> None:
    """Lifting it destroys the pod's sockets, GOAWAY and all."""
    async with node(tmp_path) as it:
        await it.attach("a", netns("a"))
        await it.pods.detach("web/a")
        assert it.kernel.calls[-2:] == ["drain web/a", "detach web/a"]


async def test_pods_stay_as_they_are_while_they_are_handed_over(
    tmp_path: Path, netns: Callable[[str], Path]
) -> None:
    async with node(tmp_path) as it, trio.open_nursery() as nursery:
        await it.attach("a", netns("a"))
        refused: list[str] = []

        async def detach() -> None:
            try:
                await it.pods.detach("web/a")
            except MeshbpfError as error:
                refused.append(error.code)

        async with it.pods.frozen():
            nursery.start_soon(detach)
            await trio.testing.wait_all_tasks_blocked()
            found = [name.partition("/")[0] for name, _ in it.pods.descriptors()]
            assert found == ["netns", *["listener"] * 2 * len(Role)]
            it.pods.retire()
        await it.until(lambda: bool(refused))
        assert refused == ["replaced"], "the client asks the new agent"
        assert it.server.serving == ["web/a as shop"], "what is carried goes on"
        assert list(it.kernel.pods) == ["web/a"]


async def test_a_forwarder_that_fails_after_a_reload_opens_no_listener(
    tmp_path: Path, netns: Callable[[str], Path]
) -> None:
    """It would take them from the successor."""
    async with node(tmp_path) as it:
        it.server.fails = 1
        await it.attach("a", netns("a"))
        async with it.pods.frozen():
            before = list(it.kernel.calls)
            it.pods.retire()
        await trio.sleep(0.2)
        assert it.kernel.calls == before


async def test_the_same_attach_again_changes_nothing(
    tmp_path: Path, netns: Callable[[str], Path]
) -> None:
    async with node(tmp_path) as it:
        path = netns("a")
        await it.attach("a", path)
        before = list(it.kernel.calls)
        assert (await it.attach("a", path)).outcome == "unchanged"
        assert it.kernel.calls == before


async def test_new_options_reach_the_kernel_and_leave_the_forwarder_alone(
    tmp_path: Path, netns: Callable[[str], Path]
) -> None:
    async with node(tmp_path) as it:
        path = netns("a")
        await it.attach("a", path)
        result = await it.attach("a", path, on_agent_down="open", exempt_ports=(22,))
        assert result.outcome == "updated"
        assert it.kernel.specs["web/a"].exempt_ports == {22}
        assert it.kernel.specs["web/a"].on_agent_down is OnAgentDown.OPEN
        assert it.server.started == 1
        assert "detach web/a" not in it.kernel.calls


async def test_another_account_gets_another_forwarder_without_a_moment_uncaptured(
    tmp_path: Path, netns: Callable[[str], Path]
) -> None:
    async with node(tmp_path) as it:
        path = netns("a")
        await it.attach("a", path)
        it.mesh = Snapshot.of(MeshState((workload("a", "stock"),)), 2)
        result = await it.attach("a", path)
        assert result.pod.service_account == "stock"
        assert it.server.serving == ["web/a as stock"]
        assert it.identities() == ["stock"]
        assert "detach web/a" not in it.kernel.calls


async def test_a_pod_that_came_back_in_another_namespace_is_taken_from_there(
    tmp_path: Path, netns: Callable[[str], Path]
) -> None:
    async with node(tmp_path) as it:
        await it.attach("a", netns("a"))
        first = it.kernel.pods["web/a"].cookie
        await it.attach("a", netns("a2"))
        assert it.kernel.pods["web/a"].cookie != first
        assert it.server.serving == ["web/a as shop"]


async def test_a_namespace_belongs_to_one_pod(tmp_path: Path, netns: Callable[[str], Path]) -> None:
    async with node(tmp_path) as it:
        path = netns("a")
        await it.attach("a", path)
        with pytest.raises(MeshbpfError, match="is attached as pod web/a"):
            await it.attach("b", path)
        assert it.identities() == ["shop"]


async def test_a_refused_attach_leaves_nothing(
    tmp_path: Path, netns: Callable[[str], Path]
) -> None:
    async with node(tmp_path) as it:
        path = netns("a")
        it.kernel.attach_error = MeshbpfError("verifier", "the kernel says no")
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(MeshbpfError, match="the kernel says no"):
            await it.attach("a", path)
        assert len(os.listdir("/proc/self/fd")) == before
        assert (it.pods.list(), it.identities(), it.recorded()) == ([], [], [])


async def test_a_namespace_without_ipv6_is_attached_all_the_same(
    tmp_path: Path, netns: Callable[[str], Path]
) -> None:
    async with node(tmp_path) as it:
        path = netns("a")
        sysctl = ["sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1"]
        await trio.run_process(["nsenter", f"--net={path}", *sysctl])
        assert (await it.attach("a", path)).outcome == "attached"


async def test_detach_forgets_everything_and_twice_is_no_error(
    tmp_path: Path, netns: Callable[[str], Path]
) -> None:
    async with node(tmp_path) as it:
        before = len(os.listdir("/proc/self/fd"))
        await it.attach("a", netns("a"))
        assert (await it.pods.detach("web/a")).outcome == "detached"
        assert len(os.listdir("/proc/self/fd")) == before
        assert (it.recorded(), it.identities(), it.server.serving) == ([], [], [])
        assert (await it.pods.detach("web/a")).outcome == "not-attached"
        with pytest.raises(MeshbpfError, match="does not know it"):
            await it.pods.detach("web/nobody")


async def test_a_detach_that_the_kernel_refuses_leaves_the_pod_as_it_was(
    tmp_path: Path, netns: Callable[[str], Path]
) -> None:
    async with node(tmp_path) as it:
        await it.attach("a", netns("a"))
        it.kernel.detach_error = MeshbpfError("busy", "not now")
        with pytest.raises(MeshbpfError, match="not now"):
            await it.pods.detach("web/a")
        assert it.server.serving == ["web/a as shop"]
        assert it.recorded() == ["web/a"]


async def test_a_pod_whose_namespace_vanishes_is_detached_and_lets_it_die(
    tmp_path: Path, netns: Callable[[str], Path]
) -> None:
    others = namespaces_held()
    async with node(tmp_path) as it:
        await it.attach("a", netns("a"))
        await it.attach("b", netns("b"))
        assert namespaces_held() == others + 2
        await trio.run_process(["ip", "netns", "del", f"{TAG}-a"])
        # The record is the last that changes.
        await it.until(lambda: it.recorded() == ["web/b"])
        assert it.states() == {"web/b": "attached"}
        assert it.identities() == ["stock"]
        assert it.server.serving == ["web/b as stock"]
        assert namespaces_held() == others + 1


async def test_a_forwarder_that_fails_gets_fresh_listeners_and_others_do_not_notice(
    tmp_path: Path, netns: Callable[[str], Path]
) -> None:
    async with node(tmp_path) as it:
        await it.attach("b", netns("b"))
        it.server.fails = 1
        await it.attach("a", netns("a"))
        assert it.states() == {"web/a": "failed", "web/b": "attached"}
        await it.until(lambda: it.states()["web/a"] == "attached")
        assert "set_listeners web/a" in it.kernel.calls
        assert it.server.serving == ["web/b as stock", "web/a as shop"]


async def test_the_next_agent_takes_the_pods_over_and_lifts_what_no_record_names(
    tmp_path: Path, netns: Callable[[str], Path]
) -> None:
    kernel = Kernel()
    async with node(tmp_path, kernel) as it:
        await it.attach("a", netns("a"))
        await it.attach("b", netns("b"))
    await trio.run_process(["ip", "netns", "del", f"{TAG}-b"])
    kernel.pods["web/ghost"] = dataclasses.replace(kernel.pods["web/a"], key="web/ghost")
    kernel.calls.clear()
    async with node(tmp_path, kernel) as it:
        await trio.testing.wait_all_tasks_blocked()
        assert kernel.calls == ["detach web/ghost", "attach web/a", "detach web/b"]
        assert it.server.serving == ["web/a as shop"]
        assert it.recorded() == ["web/a"]


async def test_a_pod_that_cannot_be_taken_over_is_shown_and_tried_again(
    tmp_path: Path, netns: Callable[[str], Path]
) -> None:
    kernel = Kernel()
    async with node(tmp_path, kernel) as it:
        await it.attach("a", netns("a"))
        await it.attach("b", netns("b"))
    kernel.attach_error = OSError(12, "no memory")
    async with node(tmp_path, kernel) as it:
        assert it.states() == {"web/a": "failed", "web/b": "failed"}
        assert "no memory" in it.pods.list()[0].reason
        assert it.recorded() == ["web/a", "web/b"]
        kernel.attach_error = None
        await it.until(lambda: set(it.states().values()) == {"attached"})
        assert it.identities() == ["shop", "stock"]


async def test_a_record_that_is_not_understood_stops_the_start_and_stays(
    tmp_path: Path, netns: Callable[[str], Path]
) -> None:
    kernel = Kernel()
    async with node(tmp_path, kernel) as it:
        await it.attach("a", netns("a"))
    (tmp_path / "attachments.json").write_text("{")
    with pytest.RaisesGroup(ConfigError):
        async with node(tmp_path, kernel):
            raise AssertionError("started")
    assert (tmp_path / "attachments.json").read_text() == "{"
    assert "web/a" in kernel.pods  # capture was not lifted


async def test_a_stopping_agent_serves_no_more_but_the_capture_stays(
    tmp_path: Path, netns: Callable[[str], Path]
) -> None:
    async with node(tmp_path) as it:
        path = netns("a")
        await it.attach("a", path, on_agent_down="open")
        await it.pods.stop_serving()
        assert it.server.serving == []
        assert "web/a" in it.kernel.pods
        assert it.recorded() == ["web/a"]
        with pytest.raises(MeshbpfError, match="is stopping"):
            await it.attach("b", path)


async def test_a_new_trust_domain_in_the_mesh_changes_the_certificate(
    tmp_path: Path, netns: Callable[[str], Path]
) -> None:
    async with node(tmp_path) as it:
        await it.attach("a", netns("a"))
        known = workload("a", "shop")
        moved = Workload(
            uid=known.uid, name="a", namespace="web", service_account="shop", trust_domain="other"
        )
        it.pods.refresh(Snapshot.of(MeshState((moved,)), 2))
        (cert,) = it.certificates.describe().certs
        assert cert.identity == "spiffe://other/ns/web/sa/shop"
