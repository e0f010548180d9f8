"""The control socket: who is let in, what is answered, and its bounds."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from meshbpf.agent import api
from meshbpf.agent.api_client import RemoteError, call
from meshbpf.agent.core.errors import Exit, MeshbpfError, PrivilegeError, UnavailableError
from meshbpf.agent.runtime import control
from meshbpf.agent.runtime.control import ControlServer

VERSION = api.VersionResult(
    version="1", api_version=api.API_VERSION, agent_id="a", python="3", kernel="6"
)
NOBODY = 65534


@asynccontextmanager
async def served(directory: Path) -> AsyncIterator[ControlServer]:
    """A server that knows `version`, a `detach` that refuses and a `certs` that breaks."""
    server = ControlServer(directory / api.CONTROL_SOCKET)

    async def version(_request: api.VersionRequest) -> api.VersionResult:
        return VERSION

    async def detach(request: api.DetachRequest) -> api.DetachResult:
        raise MeshbpfError("unknown-pod", f"no pod {request.pod}", "look again")

    async def certs(_request: api.CertsRequest) -> api.CertsResult:
        raise ZeroDivisionError("a fault of ours")

    server.handle(api.VersionRequest, version)
    server.handle(api.DetachRequest, detach)
    server.handle(api.CertsRequest, certs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve, server.open())
        yield server
        nursery.cancel_scope.cancel()


async def ask(directory: Path, request: api.Request[api.R]) -> api.R:
    return await trio.to_thread.run_sync(lambda: call(directory, request, timeout_s=10.0))


async def connect(directory: Path) -> trio.SocketStream:
    stream = await trio.open_unix_socket(directory / api.CONTROL_SOCKET)
    assert isinstance(stream, trio.SocketStream)
    return stream


async def answer(stream: trio.SocketStream) -> dict[str, object]:
    received = b""
    with trio.fail_after(10):
        while not received.endswith(b"\n"):
            data = await stream.receive_some()
            assert data, f"hung up after {received!r}"
            received += data
    found = json.loads(received)
    assert isinstance(found, dict)
    return found


async def test_a_request_gets_its_typed_answer(tmp_path: Path) -> None:
    async with served(tmp_path):
        assert await ask(tmp_path, api.VersionRequest()) == VERSION


async def test_the_socket_is_its_owners_alone_and_goes_with_the_agent(tmp_path: Path) -> None:
    path = tmp_path / api.CONTROL_SOCKET
    async with served(tmp_path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


async def test_a_leftover_of_a_dead_agent_is_replaced(tmp_path: Path) -> None:
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(tmp_path / api.CONTROL_SOCKET))
    dead.close()
    async with served(tmp_path):
        assert await ask(tmp_path, api.VersionRequest()) == VERSION


async def test_a_refusal_arrives_with_code_hint_and_status(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        with pytest.raises(RemoteError, match="no pod a/b") as caught:
            await ask(tmp_path, api.DetachRequest(pod="a/b"))
        assert (caught.value.code, caught.value.hint) == ("unknown-pod", "look again")
        assert caught.value.exit_status == Exit.FAILED
        assert server.statistics().failed == 1


async def test_a_fault_in_one_verb_is_answered_and_the_server_goes_on(tmp_path: Path) -> None:
    async with served(tmp_path):
        with pytest.raises(RemoteError, match="ZeroDivisionError: a fault of ours"):
            await ask(tmp_path, api.CertsRequest())
        assert await ask(tmp_path, api.VersionRequest()) == VERSION


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        (b"not json\n", "bad-request", "malformed"),
        (b'{"verb": "version", "args": {"x": 1}}\n', "bad-request", "unknown field `x`"),
        (b'{"verb": "detach"}\n', "bad-request", "`pod`"),
        (b'{"verb": "fly"}\n', "unknown-verb", "'fly'"),
        (b'{"verb": "attach", "args": {"pod": "a/b", "netns": "n"}}\n', "unknown-verb", "attach"),
        (b'{"verb": "version", "extra": 1}\n', "bad-request", "unknown field `extra`"),
    ],
)
async def test_a_request_that_is_not_understood_is_a_usage_error(
    tmp_path: Path, line: bytes, code: str, told: str
) -> None:
    async with served(tmp_path):
        stream = await connect(tmp_path)
        async with stream:
            await stream.send_all(line)
            reply = await answer(stream)
            assert reply["ok"] is False
            error = reply["error"]
            assert isinstance(error, dict)
            assert (error["code"], error["exit_status"]) == (code, Exit.USAGE)
            assert told in error["what"]
            # The connection is still good.
            await stream.send_all(b'{"verb": "version"}\n')
            assert (await answer(stream))["ok"] is True


async def test_two_requests_in_one_packet_are_answered_in_turn(tmp_path: Path) -> None:
    async with served(tmp_path), await connect(tmp_path) as stream:
        await stream.send_all(b'{"verb": "version"}\n{"verb": "ver')
        assert (await answer(stream))["ok"] is True
        await stream.send_all(b'sion"}\n')
        assert (await answer(stream))["ok"] is True


async def test_a_request_without_end_is_cut_off(tmp_path: Path) -> None:
    async with served(tmp_path):
        async with await connect(tmp_path) as stream:
            with trio.fail_after(10):
                try:
                    while True:
                        await stream.send_all(b"x" * 4096)
                except trio.BrokenResourceError:
                    pass
        assert await ask(tmp_path, api.VersionRequest()) == VERSION


async def test_a_silent_client_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "CLIENT_IDLE_S", 0.2)
    async with served(tmp_path), await connect(tmp_path) as stream:
        with trio.fail_after(5):
            assert await stream.receive_some() == b""


async def test_one_client_too_many_is_told_to_come_back(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        streams = [await connect(tmp_path) for _ in range(control.MAX_CLIENTS)]
        for stream in streams:  # each is being served, not only queued
            await stream.send_all(b'{"verb": "version"}\n')
            await answer(stream)
        async with await connect(tmp_path) as late:
            error = (await answer(late))["error"]
            assert isinstance(error, dict)
            assert error["code"] == "busy"
        assert server.statistics().turned_away == 1
        for stream in streams:
            await stream.aclose()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert await ask(tmp_path, api.VersionRequest()) == VERSION


@pytest.mark.root
async def test_another_user_is_refused_even_when_the_modes_let_him_in(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)
    async with served(tmp_path) as server:
        (tmp_path / api.CONTROL_SOCKET).chmod(0o666)

        async def as_nobody() -> bytes:
            script = (
                "import os, socket, sys; os.setgid(65534); os.setuid(65534)\n"
                "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
                "sys.stdout.buffer.write(s.recv(65536))"
            )
            argv = ["/usr/bin/python3", "-c", script, str(tmp_path / api.CONTROL_SOCKET)]
            done = await trio.run_process(argv, capture_stdout=True)
            return bytes(done.stdout)

        reply = json.loads(await as_nobody())
        assert reply["error"]["code"] == "forbidden"
        assert reply["error"]["exit_status"] == Exit.NOPERM
        assert server.statistics().forbidden == 1


def test_the_client_says_that_no_agent_answers(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="no agent answers"):
        call(tmp_path, api.VersionRequest())
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(tmp_path / api.CONTROL_SOCKET))
    dead.close()
    with pytest.raises(UnavailableError, match="no agent answers"):
        call(tmp_path, api.VersionRequest())


def test_the_client_does_not_talk_to_what_is_no_socket(tmp_path: Path) -> None:
    (tmp_path / api.CONTROL_SOCKET).write_text("")
    with pytest.raises(UnavailableError, match="not a socket"):
        call(tmp_path, api.VersionRequest())


@pytest.mark.root
def test_the_client_does_not_talk_to_another_users_socket(tmp_path: Path) -> None:
    path = tmp_path / api.CONTROL_SOCKET
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(path))
        foreign.listen()
        os.chown(path, NOBODY, NOBODY)
        with pytest.raises(PrivilegeError, match=f"uid {NOBODY}") as caught:
            call(tmp_path, api.VersionRequest())
        assert caught.value.exit_status == Exit.NOPERM


def test_the_client_gives_up_on_an_agent_that_hangs(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as hung:
        hung.bind(str(tmp_path / api.CONTROL_SOCKET))
        hung.listen()
        with pytest.raises(UnavailableError, match="does not answer in time"):
            call(tmp_path, api.VersionRequest(), timeout_s=0.2)


def test_every_request_names_its_verb_and_result() -> None:
    for verb, request in api.REQUESTS.items():
        assert verb == request.VERB
        assert issubclass(request.RESULT, api.Result)
