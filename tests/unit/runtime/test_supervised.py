"""When a service manager is told what."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.runtime import supervised
from meshbpf.agent.runtime.notify import Notifier
from meshbpf.agent.runtime.supervised import tell


class Agent:
    """An agent whose state a test decides."""

    def __init__(self) -> None:
        self.line = "2 pods, 0 connections"
        self.answers: bool | MeshbpfError = True
        self.threads: set[int] = set()

    def status_line(self) -> str:
        return self.line

    def datapath_answers(self) -> bool:
        self.threads.add(threading.get_ident())
        if isinstance(self.answers, MeshbpfError):
            raise self.answers
        return self.answers


class Manager:
    """The manager's end of the socket."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.setblocking(False)
        self.notifier = Notifier(str(path), 0.2)

    def heard(self) -> list[str]:
        """All lines since the last call."""
        lines: list[str] = []
        while True:
            try:
                lines += self.socket.recv(4096).decode().splitlines()
            except BlockingIOError:
                return lines

    async def hears(self, line: str) -> None:
        with trio.fail_after(5.0):
            while line not in self.heard():  # noqa: ASYNC110 (a socket, not an event)
                await trio.sleep(0.02)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(tmp_path / "notify")
    yield manager
    manager.socket.close()


async def test_ready_comes_first_the_end_last_and_the_watchdog_in_between(
    manager: Manager,
) -> None:
    with trio.move_on_after(0.3):
        await tell(manager.notifier, Agent())
    heard = manager.heard()
    assert heard[:2] == ["READY=1", "STATUS=2 pods, 0 connections"]
    assert heard[-2:] == ["STOPPING=1", "STATUS=stopping"]
    assert set(heard[2:-2]) == {"WATCHDOG=1"}


@pytest.mark.parametrize("answer", [False, MeshbpfError("bpf", "no map")])
async def test_an_agent_whose_data_path_does_not_answer_starves_the_watchdog(
    manager: Manager, answer: bool | MeshbpfError
) -> None:
    agent = Agent()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tell, manager.notifier, agent)
        await manager.hears("WATCHDOG=1")
        agent.answers = answer
        await trio.sleep(0.2)
        manager.heard()
        await trio.sleep(0.3)
        assert manager.heard() == []
        agent.answers = True
        await manager.hears("WATCHDOG=1")
        nursery.cancel_scope.cancel()
    assert threading.get_ident() not in agent.threads


async def test_a_new_status_is_told_once(manager: Manager) -> None:
    agent = Agent()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tell, manager.notifier, agent)
        await manager.hears("READY=1")
        agent.line = "3 pods, 1 connections"
        await manager.hears("STATUS=3 pods, 1 connections")
        await trio.sleep(0.3)
        assert set(manager.heard()) == {"WATCHDOG=1"}
        nursery.cancel_scope.cancel()


async def test_without_a_manager_it_ends_at_once() -> None:
    with trio.fail_after(1.0):
        await tell(Notifier(None, None), Agent())


async def test_a_start_that_waits_for_a_control_plane_is_given_time_and_another_is_not(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervised, "PATIENCE_EVERY_S", 0.05)
    missing = ["bpf", "mesh-state"]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervised.ask_for_patience, manager.notifier, lambda: missing)
        await trio.sleep(0.3)
        assert manager.heard() == [], "it compiles: the unit's own limit holds"
        missing.remove("bpf")
        await manager.hears("STATUS=not ready, pending mesh-state")
        missing.clear()
        await trio.sleep(0.2)
        assert set(manager.heard()) <= {
            "STATUS=not ready, pending mesh-state",
            "EXTEND_TIMEOUT_USEC=60000000",
        }
        await trio.sleep(0.2)
        assert manager.heard() == []
        nursery.cancel_scope.cancel()
