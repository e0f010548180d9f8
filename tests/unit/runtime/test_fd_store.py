"""A pod's listeners at the service manager, and which of them a successor takes."""

from __future__ import annotations

import array
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshbpf.agent.datapath.netns import Netns
from meshbpf.agent.datapath.steering import Role
from meshbpf.agent.runtime.fd_store import FdStore
from meshbpf.agent.runtime.notify import Notifier

POD = "web/shop"
OUTBOUND = "listener/web/shop/outbound/ipv4"


class Manager:
    """Keeps what it is sent, as systemd does: by name, until told to forget.

    It reads all the while: by default ten datagrams fill a socket's queue
    (net.unix.max_dgram_qlen), and one pod has more descriptors.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(path)
        self.kept: dict[str, list[int]] = {}
        self._settled = threading.Semaphore(0)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def store(self) -> FdStore:
        """A store that begins with what is kept, as a new process of the unit finds it."""
        self.settle()
        return FdStore(
            Notifier(self.path, None), {k: list(map(os.dup, v)) for k, v in self.kept.items()}
        )

    def settle(self) -> dict[str, list[int]]:
        """What is kept once all that was sent is read."""
        self._say(b"SETTLED=1")
        assert self._settled.acquire(timeout=10.0)
        return self.kept

    def close(self) -> None:
        self._say(b"END=1")
        self._reader.join(10.0)
        for fds in self.kept.values():
            for fd in fds:
                os.close(fd)
        self.socket.close()

    def _say(self, message: bytes) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(message, self.path)

    def _read(self) -> None:
        while True:
            data, control, _flags, _peer = self.socket.recvmsg(4096, socket.CMSG_SPACE(1024))
            message = dict(line.split("=", 1) for line in data.decode().splitlines())
            if "END" in message:
                return
            if "SETTLED" in message:
                self._settled.release()
            elif "FDSTOREREMOVE" in message:
                for fd in self.kept.pop(message["FDNAME"], []):
                    os.close(fd)
            else:
                kept = self.kept.setdefault(message["FDNAME"], [])
                kept += [fd for _level, _kind, raw in control for fd in array.array("i", raw)]


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(str(tmp_path / "notify"))
    yield manager
    manager.close()


@pytest.fixture
def netns() -> Iterator[Netns]:
    try:
        own = Netns.own()
    except Exception as error:  # needs CAP_SYS_ADMIN
        pytest.skip(str(error))
    yield own
    own.close()


def listener(family: int = socket.AF_INET) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
    sock.listen()
    return sock


def test_connections_made_between_two_agents_wait_for_the_second(
    manager: Manager, netns: Netns
) -> None:
    first = listener()
    address = first.getsockname()
    manager.store().keep(POD, netns, {(Role.OUTBOUND, socket.AF_INET): first})
    assert set(manager.settle()) == {"netns/web/shop", OUTBOUND}
    first.close()
    with socket.create_connection(address, timeout=2.0) as client:
        client.sendall(b"waiting")
        taken = manager.store().take(POD, netns)
        assert list(taken) == [(Role.OUTBOUND, socket.AF_INET)]
        with taken[Role.OUTBOUND, socket.AF_INET] as second:
            served, _ = second.accept()
            with served:
                assert served.recv(100) == b"waiting"


def test_what_was_taken_is_not_there_a_second_time(manager: Manager, netns: Netns) -> None:
    with listener() as first:
        manager.store().keep(POD, netns, {(Role.HBONE, socket.AF_INET): first})
    store = manager.store()
    for sock in store.take(POD, netns).values():
        sock.close()
    assert store.take(POD, netns) == {}
    assert store.inherited == 0


def test_fresh_listeners_replace_the_ones_that_were_kept(manager: Manager, netns: Netns) -> None:
    store = manager.store()
    with listener() as old, listener() as new:
        store.keep(POD, netns, {(Role.INBOUND, socket.AF_INET): old})
        manager.settle()  # a queue may be as short as ten (net.unix.max_dgram_qlen)
        store.keep(POD, netns, {(Role.INBOUND, socket.AF_INET): new})
        taken = manager.store().take(POD, netns)[Role.INBOUND, socket.AF_INET]
        with taken:
            assert taken.getsockname() == new.getsockname()
    assert [len(fds) for fds in manager.settle().values()] == [1, 1]


def test_a_detached_pod_leaves_nothing_with_the_manager(manager: Manager, netns: Netns) -> None:
    store = manager.store()
    with listener() as sock:
        store.keep(POD, netns, {(Role.INBOUND, socket.AF_INET): sock})
        store.keep("web/other", netns, {(Role.INBOUND, socket.AF_INET): sock})
    assert store.keeps(POD)
    store.drop(POD)
    assert not store.keeps(POD)
    assert set(manager.settle()) == {"netns/web/other", "listener/web/other/inbound/ipv4"}


def test_listeners_of_pods_that_are_no_more_are_dropped(manager: Manager, netns: Netns) -> None:
    with listener() as sock:
        manager.store().keep(POD, netns, {(Role.INBOUND, socket.AF_INET): sock})
        address = sock.getsockname()
    store = manager.store()
    assert store.inherited == 2
    store.drop_unclaimed()
    assert store.inherited == 0
    assert manager.settle() == {}
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=2.0)


def test_a_socket_that_does_not_listen_or_is_of_another_family_is_not_taken(
    manager: Manager, netns: Netns
) -> None:
    with socket.socket() as idle, listener(socket.AF_INET6) as six:
        manager.store().keep(
            POD,
            netns,
            {(Role.OUTBOUND, socket.AF_INET): idle, (Role.INBOUND, socket.AF_INET): six},
        )
    store = manager.store()
    assert store.take(POD, netns) == {}
    assert store.inherited == 0


def test_listeners_of_another_namespace_are_not_taken(manager: Manager, netns: Netns) -> None:
    with listener() as sock:
        manager.store().keep(POD, netns, {(Role.OUTBOUND, socket.AF_INET): sock})
    elsewhere = Netns(netns.path, netns.fd, netns.dev, netns.inode + 1, netns.cookie)
    assert manager.store().take(POD, elsewhere) == {}
    elsewhere = Netns(netns.path, netns.fd, netns.dev, netns.inode, netns.cookie + 1)
    assert manager.store().take(POD, elsewhere) == {}


def test_the_longest_pod_name_that_kubernetes_allows_is_kept_too(
    manager: Manager, netns: Netns
) -> None:
    pod = f"{'n' * 63}/{'p' * 253}"
    with listener() as sock:
        manager.store().keep(pod, netns, {(Role.OUTBOUND, socket.AF_INET): sock})
        assert len(manager.settle()) == 2
        taken = manager.store().take(pod, netns)
        assert taken[Role.OUTBOUND, socket.AF_INET].getsockname() == sock.getsockname()
        taken[Role.OUTBOUND, socket.AF_INET].close()


def test_without_a_manager_nothing_is_kept_and_nothing_fails(netns: Netns) -> None:
    store = FdStore(Notifier(None, None), {})
    with listener() as sock:
        store.keep(POD, netns, {(Role.OUTBOUND, socket.AF_INET): sock})
    assert not store.keeps(POD)
    store.drop(POD)
    store.drop_unclaimed()
    assert store.take(POD, netns) == {}
