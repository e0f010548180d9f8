"""Both ends of ZDS against each other, over a real socket, with descriptors of a real namespace."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.datapath.netns import Netns
from meshbpf.agent.runtime import zds_client
from meshbpf.agent.runtime.zds_server import Entry, ZdsServer
from meshbpf.agent.wire import zds

pytestmark = pytest.mark.compat

WEB = zds.Add("1", "web", "shop", "web")
DB = zds.Add("2", "db", "shop", "db")


@dataclass
class Proxy:
    """Remembers what it is asked, as words; refuses pods whose name is in `refused`."""

    said: list[str] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)
    inodes: set[int] = field(default_factory=set)

    def begin(self) -> None:
        self.said.append("begin")

    def lost(self) -> None:
        self.said.append("lost")

    async def add(self, pod: zds.Add, netns_fd: int) -> None:
        self.inodes.add(os.fstat(netns_fd).st_ino)
        os.close(netns_fd)
        self.said.append(f"add {pod.uid} {pod.namespace}/{pod.name} {pod.service_account}")
        if pod.name in self.refused:
            raise MeshbpfError("full", "no room")

    async def keep(self, uid: str) -> None:
        self.said.append(f"keep {uid}")

    async def delete(self, uid: str) -> None:
        self.said.append(f"delete {uid}")

    async def snapshot(self) -> None:
        self.said.append("snapshot")

    async def hears(self, *words: str) -> None:
        """Exactly these next."""
        with trio.fail_after(5):
            while len(self.said) < len(words):  # noqa: ASYNC110 (the client has no event)
                await trio.sleep(0.005)
        assert tuple(self.said[: len(words)]) == words
        del self.said[: len(words)]

    async def hears_no_more(self) -> None:
        await trio.sleep(0.1)
        assert self.said == []


@dataclass
class Bed:
    path: Path
    nursery: trio.Nursery
    server: ZdsServer
    netns: Netns
    started: list[tuple[str, int]]

    def connect(self) -> tuple[Proxy, trio.CancelScope]:
        proxy, scope = Proxy(), trio.CancelScope()

        async def run() -> None:
            with scope:
                await zds_client.run(self.path, proxy)

        self.nursery.start_soon(run)
        return proxy, scope

    def put(self, add: zds.Add) -> None:
        self.server.put(f"{add.namespace}/{add.name}", add, self.netns)


@asynccontextmanager
async def served(tmp_path: Path) -> AsyncIterator[Bed]:
    started: list[tuple[str, int]] = []

    async def on_started(entry: Entry, pid: int) -> None:
        started.append((entry.key, pid))

    place = Path("/proc/self/ns/net")
    fd = os.open(place, os.O_RDONLY)
    status = os.fstat(fd)
    netns = Netns(place, fd, status.st_dev, status.st_ino, 1)
    server = ZdsServer(tmp_path / "zds.sock", on_started, retry_s=0.05)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            yield Bed(server.path, nursery, server, netns, started)
            nursery.cancel_scope.cancel()
        for add in (WEB, DB):
            server.remove(f"{add.namespace}/{add.name}")
    finally:
        netns.close()


async def test_what_is_there_comes_before_the_snapshot_and_changes_after(tmp_path: Path) -> None:
    async with served(tmp_path) as bed:
        bed.put(WEB)
        proxy, _ = bed.connect()
        await proxy.hears("begin", "add 1 shop/web web", "snapshot")
        assert proxy.inodes == {bed.netns.inode}
        bed.put(DB)
        await proxy.hears("add 2 shop/db db")
        bed.put(DB)
        bed.server.remove("shop/web")
        await proxy.hears("delete 1")
        await proxy.hears_no_more()
        assert bed.started == [("shop/web", os.getpid()), ("shop/db", os.getpid())]
        assert bed.server.unserved() == []


async def test_another_account_is_another_pod(tmp_path: Path) -> None:
    async with served(tmp_path) as bed:
        bed.put(WEB)
        proxy, _ = bed.connect()
        await proxy.hears("begin", "add 1 shop/web web", "snapshot")
        bed.put(zds.Add("1", "web", "shop", "admin"))
        await proxy.hears("delete 1", "add 1 shop/web admin")


async def test_a_refused_pod_is_offered_again_and_holds_up_no_other(tmp_path: Path) -> None:
    async with served(tmp_path) as bed:
        proxy, _ = bed.connect()
        proxy.refused.add("web")
        await proxy.hears("begin", "snapshot")
        bed.put(WEB)
        bed.put(DB)
        await proxy.hears("add 1 shop/web web", "add 2 shop/db db", "add 1 shop/web web")
        assert bed.server.unserved() == ["shop/web"]
        proxy.refused.clear()
        with trio.fail_after(5):
            assert await bed.server.until_served("shop/web", 5)
        assert bed.started == [("shop/db", os.getpid()), ("shop/web", os.getpid())]


async def test_who_comes_back_is_told_all_and_nothing_of_what_went(tmp_path: Path) -> None:
    async with served(tmp_path) as bed:
        bed.put(WEB)
        bed.put(DB)
        first, scope = bed.connect()
        await first.hears("begin", "add 1 shop/web web", "add 2 shop/db db", "snapshot")
        scope.cancel()
        with trio.fail_after(5):
            while bed.server.pid:  # noqa: ASYNC110 (nor has the server)
                await trio.sleep(0.005)
        assert bed.server.unserved() == ["shop/db", "shop/web"]
        assert not await bed.server.until_served("shop/web", 5)  # nobody to wait for
        bed.server.remove("shop/db")
        second, _ = bed.connect()
        await second.hears("begin", "add 1 shop/web web", "snapshot")


async def test_of_two_the_newest_is_told_and_then_the_other_again(tmp_path: Path) -> None:
    async with served(tmp_path) as bed:
        old, _ = bed.connect()
        await old.hears("begin", "snapshot")
        new, scope = bed.connect()
        await new.hears("begin", "snapshot")
        bed.put(WEB)
        await new.hears("add 1 shop/web web")
        await old.hears_no_more()
        scope.cancel()
        await old.hears("add 1 shop/web web")


async def test_a_client_outlives_its_server(tmp_path: Path) -> None:
    proxy = Proxy()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(zds_client.run, tmp_path / "zds.sock", proxy)
        for _ in range(2):
            async with served(tmp_path) as bed:
                bed.put(WEB)
                await proxy.hears("begin", "add 1 shop/web web", "snapshot")
            await proxy.hears("lost")
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def asking(folder: Path, proxy: Proxy) -> AsyncIterator[trio.socket.SocketType]:
    """The socket at which the client asks again and again, for five seconds at most."""
    path = folder / "zds.sock"
    with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_SEQPACKET) as listener:
        await listener.bind(str(path))
        listener.listen()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(zds_client.run, path, proxy)
            with trio.fail_after(5):
                yield listener
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "request_",
    [zds.encode(WEB), b"\x0a\x03\x0a\x01u", b"\xff", b""],
    ids=["no namespace", "no pod info", "no message", "nothing"],
)
async def test_a_request_that_breaks_the_rules_is_answered_and_ends_the_connection(
    tmp_path: Path, request_: bytes
) -> None:
    proxy = Proxy()
    async with asking(tmp_path, proxy) as listener:
        for _ in range(2):
            sock, _ = await listener.accept()
            with sock:
                zds.read_hello(await sock.recv(zds.PACKET_BYTES))
                if request_:
                    await sock.send(request_)
                    assert zds.read_answer(await sock.recv(zds.PACKET_BYTES)) != ""
                else:
                    sock.shutdown(trio.socket.SHUT_WR)
                assert await sock.recv(zds.PACKET_BYTES) == b""
            await proxy.hears("begin", "lost")


async def test_a_second_snapshot_and_a_late_keep_break_the_rules(tmp_path: Path) -> None:
    proxy = Proxy()
    async with asking(tmp_path, proxy) as listener:
        for late in (zds.SnapshotSent(), zds.Keep("1")):
            sock, _ = await listener.accept()
            with sock:
                await sock.recv(zds.PACKET_BYTES)
                for request in (zds.Keep("1"), zds.SnapshotSent()):
                    await sock.send(zds.encode(request))
                    assert zds.read_answer(await sock.recv(zds.PACKET_BYTES)) == ""
                await sock.send(zds.encode(late))
                assert "zds" not in zds.read_answer(await sock.recv(zds.PACKET_BYTES))
                assert await sock.recv(zds.PACKET_BYTES) == b""
            await proxy.hears("begin", "keep 1", "snapshot", "lost")


@pytest.mark.parametrize("packet", [b"", b"\x08\x02", b"\xff"], ids=repr)
async def test_who_does_not_say_hello_is_told_nothing(tmp_path: Path, packet: bytes) -> None:
    async with served(tmp_path) as bed:
        bed.put(WEB)
        with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_SEQPACKET) as sock:
            await sock.connect(str(bed.path))
            if packet:
                await sock.send(packet)
            else:
                sock.shutdown(trio.socket.SHUT_WR)
            with trio.fail_after(5):
                assert await sock.recv(1024) == b""
        assert bed.started == []


async def test_the_socket_is_root_s_alone_and_gone_afterwards(tmp_path: Path) -> None:
    async with served(tmp_path) as bed:
        assert bed.path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == []
