"""What goes to a service manager's socket, and what comes back from its store."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from meshbpf.agent.runtime.notify import Notifier, NotifyError, check_name, take_stored


@dataclass(slots=True)
class Manager:
    """The receiving end: a real datagram socket."""

    socket: socket.socket
    path: str

    def receive(self) -> tuple[dict[str, str], list[int]]:
        """One message and the descriptors beside it."""
        room = array.array("i").itemsize * 253
        data, control, _flags, _peer = self.socket.recvmsg(65536, socket.CMSG_SPACE(room))
        fds: list[int] = []
        for level, kind, raw in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds += array.array("i", raw)
        return dict(line.split("=", 1) for line in data.decode().splitlines()), fds

    def notifier(self, **environ: str) -> Notifier:
        return Notifier.of({"NOTIFY_SOCKET": self.path, **environ}, 7)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        sock.settimeout(2.0)
        yield Manager(sock, path)


def test_readiness_carries_one_line_of_status(manager: Manager) -> None:
    manager.notifier().ready("3 pods,\nREADY=0 says a pod's name")
    assert manager.receive()[0] == {"READY": "1", "STATUS": "3 pods, READY=0 says a pod's name"}


def test_the_watchdog_and_the_end_are_told(manager: Manager) -> None:
    notifier = manager.notifier()
    notifier.alive()
    notifier.status("busy")
    notifier.stopping("leaving")
    assert [manager.receive()[0] for _ in range(3)] == [
        {"WATCHDOG": "1"},
        {"STATUS": "busy"},
        {"STOPPING": "1", "STATUS": "leaving"},
    ]


def test_an_abstract_socket_is_found_by_its_at_sign() -> None:
    name = f"meshbpf-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{name}")
        sock.settimeout(2.0)
        Notifier.of({"NOTIFY_SOCKET": f"@{name}"}, 7).alive()
        assert sock.recv(100) == b"WATCHDOG=1"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"WATCHDOG_USEC": "10000000"}, 10.0),
        ({"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": "7"}, 10.0),
        ({"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_of_this_process_alone_counts(
    manager: Manager, environ: dict[str, str], expected: float | None
) -> None:
    assert manager.notifier(**environ).watchdog_s == expected


def test_without_a_manager_every_message_goes_nowhere() -> None:
    notifier = Notifier.of({}, 7)
    assert not notifier.listens
    notifier.ready("here")
    notifier.store("netns/a", [0])


def test_a_socket_that_nobody_reads_is_an_error_that_names_the_unit(tmp_path: Path) -> None:
    notifier = Notifier.of({"NOTIFY_SOCKET": str(tmp_path / "nobody")}, 7)
    with pytest.raises(NotifyError, match="does not take our message") as caught:
        notifier.alive()
    assert "NotifyAccess" in caught.value.hint
    with pytest.raises(NotifyError, match="neither a path"):
        Notifier.of({"NOTIFY_SOCKET": "notify"}, 7)


def test_a_stored_descriptor_is_the_same_open_file(manager: Manager) -> None:
    read, write = os.pipe()
    manager.notifier().store("listener/web/a/outbound/ipv4", [read])
    message, fds = manager.receive()
    assert message == {"FDSTORE": "1", "FDNAME": "listener/web/a/outbound/ipv4"}
    assert len(fds) == 1
    os.close(read)
    os.write(write, b"still open")
    assert os.read(fds[0], 100) == b"still open"
    os.close(write)
    os.close(fds[0])
    manager.notifier().forget("listener/web/a/outbound/ipv4")
    assert manager.receive() == (
        {"FDSTOREREMOVE": "1", "FDNAME": "listener/web/a/outbound/ipv4"},
        [],
    )


@pytest.mark.parametrize("name", ["", "a:b", "a\nb", "é", "x" * 256])
def test_a_name_that_the_manager_would_replace_is_refused(name: str) -> None:
    with pytest.raises(NotifyError, match="cannot name a stored descriptor"):
        check_name(name)


def inherit(names: str, count: int, pid: int = 7) -> tuple[dict[str, str], int]:
    """An environment as systemd makes it, with `count` descriptors from 3 on; see LISTEN_FDS."""
    return {"LISTEN_PID": str(pid), "LISTEN_FDS": str(count), "LISTEN_FDNAMES": names}, count


def test_descriptors_come_back_by_name_and_only_to_us() -> None:
    # In a child: from 3 on this process has descriptors of its own.
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(read, 3)
        os.dup2(read, 4)
        os.dup2(read, 5)
        environ, _ = inherit("a/x:b:a/x", 3)
        other, _ = inherit("a/x:b:a/x", 3, pid=8)
        before = os.get_inheritable(3)
        held = (
            take_stored(other, 7) == {}
            and before
            and take_stored(environ, 7) == {"a/x": [3, 5], "b": [4]}
            and not environ
            and not os.get_inheritable(3)
        )
        os._exit(0 if held else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(read)
    os.close(write)


def test_what_is_held_is_said_in_order_once_the_manager_listens(manager: Manager) -> None:
    notifier = manager.notifier()
    notifier.hold()
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = sock.getsockname()
        notifier.store("kept", [sock.fileno()])
    notifier.ready("1 pod")
    manager.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.receive()
    manager.socket.settimeout(2.0)
    notifier.release()
    said, (fd,) = manager.receive()
    assert said == {"FDSTORE": "1", "FDNAME": "kept"}
    with socket.socket(fileno=fd) as kept:
        assert kept.getsockname() == address, "closed by its owner, and kept all the same"
    assert manager.receive()[0]["READY"] == "1"
    notifier.alive()
    assert manager.receive()[0] == {"WATCHDOG": "1"}


def test_the_end_asks_for_the_time_that_it_needs(manager: Manager) -> None:
    manager.notifier().stopping("stopping", 15.0)
    assert manager.receive()[0]["EXTEND_TIMEOUT_USEC"] == "15000000"
    manager.notifier().main_pid(77)
    assert manager.receive()[0] == {"MAINPID": "77"}


def test_a_start_that_takes_its_time_is_told(manager: Manager) -> None:
    manager.notifier().starting("not ready, pending mesh-state", 60.0)
    assert manager.receive()[0] == {
        "STATUS": "not ready, pending mesh-state",
        "EXTEND_TIMEOUT_USEC": "60000000",
    }
