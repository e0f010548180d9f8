"""The small HTTP server, and who may use the admin port."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus

import msgspec
import pytest
import trio

from meshbpf.agent.core.address import SocketAddress
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.datapath.sockowner import owner_of
from meshbpf.agent.runtime import httpd
from meshbpf.agent.runtime.admin import Admin, AdminSources
from meshbpf.agent.runtime.httpd import Handler, Request, Response
from meshbpf.agent.runtime.log_levels import LogLevels

NOBODY = 65534


class Empty(msgspec.Struct):
    pass


async def echo(request: Request) -> Response:
    if request.path == "/fault":
        raise ZeroDivisionError
    if request.path == "/error":
        raise MeshbpfError("a-code", "what happened")
    return Response(HTTPStatus.OK, f"{request.method} {request.path} {dict(request.query)}")


@asynccontextmanager
async def served(handler: Handler, **limits: float) -> AsyncIterator[int]:
    listeners = httpd.open_loopback(0, "test")
    port = listeners[0].getsockname()[1]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: httpd.serve(listeners, handler, **limits))  # type: ignore[arg-type]
        yield port
        nursery.cancel_scope.cancel()


async def talk(port: int, data: bytes, address: str = "127.0.0.1") -> bytes:
    with trio.fail_after(10):
        async with await trio.open_tcp_stream(address, port) as stream:
            await stream.send_all(data)
            return b"".join([part async for part in stream])


def status(answer: bytes) -> int:
    return int(answer.split()[1])


async def test_a_request_is_answered_over_both_families_with_its_query() -> None:
    async with served(echo) as port:
        for address in ("127.0.0.1", "::1"):
            answer = await talk(port, b"GET /a?b=1&c=%41&d HTTP/1.1\r\nHost: x\r\n\r\n", address)
            assert status(answer) == 200
            assert answer.endswith(b"GET /a {'b': '1', 'c': 'A', 'd': ''}")


async def test_a_body_is_read_and_dropped_and_an_endless_one_is_cut() -> None:
    async with served(echo) as port:
        head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n"
        assert status(await talk(port, head + b"12345")) == 200
        size = httpd.MAX_BODY_BYTES + 10_000
        head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size
        try:
            assert await talk(port, head + b"x" * size) == b""
        except trio.BrokenResourceError:
            return  # cut while it was sending: as good


async def test_a_fault_of_one_handler_costs_one_answer() -> None:
    async with served(echo) as port:
        assert status(await talk(port, b"GET /fault HTTP/1.1\r\nHost: x\r\n\r\n")) == 500
        answer = await talk(port, b"GET /error HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer.endswith(b"a-code: what happened\n")
        assert status(await talk(port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")) == 200


async def test_a_silent_client_and_one_too_many_are_cut_off() -> None:
    async with served(echo, max_clients=1, client_s=0.3) as port:
        async with await trio.open_tcp_stream("127.0.0.1", port) as silent:
            await trio.sleep(0.1)
            assert await talk(port, b"") == b""
            with trio.fail_after(5):
                assert await silent.receive_some() == b""
        assert status(await talk(port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")) == 200


def test_a_taken_port_names_what_it_was_for() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(MeshbpfError, match="admin port"):
            httpd.open_loopback(taken.getsockname()[1], "admin")


def admin(*, open_to_all: bool = False) -> tuple[Admin, list[str]]:
    asked: list[str] = []

    async def overview() -> msgspec.Struct:
        return Empty()

    async def dump() -> bytes:
        return b"{}"

    sources = AdminSources(LogLevels("info"), overview, dump, lambda: asked.append("quit"))
    return Admin(sources, open_to_all=open_to_all), asked


def as_nobody(port: int, path: str) -> str:
    """A script that asks as an ordinary user; prints the status."""
    return (
        "import http.client as h,os\n"
        f"os.setgroups([]);os.setgid({NOBODY});os.setuid({NOBODY})\n"
        f"c=h.HTTPConnection('127.0.0.1',{port},timeout=10);c.request('GET','{path}')\n"
        "print(c.getresponse().status)"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="changes users: needs root")
@pytest.mark.parametrize(("open_to_all", "wanted"), [(False, 403), (True, 200)])
async def test_another_user_needs_the_open_mode(open_to_all: bool, wanted: int) -> None:
    handler, _ = admin(open_to_all=open_to_all)
    async with served(handler.handle) as port:
        script = as_nobody(port, "/config_dump")
        done = await trio.run_process([sys.executable, "-c", script], capture_stdout=True)
        assert int(done.stdout) == wanted


def test_a_socket_that_was_closed_has_no_owner_not_even_root() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            ends = [
                SocketAddress.from_sockaddr(name)
                for name in (accepted.getpeername(), accepted.getsockname())
            ]
            assert owner_of(*ends) == os.geteuid()
            client.close()
            # The kernel would say uid 0 of such an orphan.
            assert owner_of(*ends) is None


@pytest.mark.parametrize(
    ("headers", "wanted"),
    [
        (b"Host: localhost:15000", 200),
        (b"Host: LOCALHOST", 200),
        (b"Host: [::1]:15000", 200),
        (b"Host: [::1]", 200),
        (b"Host: 127.0.0.1", 200),
        (b"Host: evil.example", 403),
        (b"Host: evil.example:15000", 403),
        (b"Host: localhost.evil.example", 403),
        (b"Host: ", 403),
        (b"Host: localhost\r\nOrigin: http://localhost", 200),
        (b"Host: localhost\r\nOrigin: http://localhost:8080", 403),
        (b"Host: localhost\r\nOrigin: null", 403),
        (b"Host: localhost\r\nSec-Fetch-Site: same-site", 403),
        (b"Host: localhost\r\nSec-Fetch-Site: same-origin", 200),
    ],
)
async def test_only_pages_of_our_own_are_answered(headers: bytes, wanted: int) -> None:
    handler, _ = admin()
    async with served(handler.handle) as port:
        assert status(await talk(port, b"GET / HTTP/1.1\r\n%b\r\n\r\n" % headers)) == wanted


async def test_the_page_forbids_everything_but_its_own_files() -> None:
    handler, _ = admin()
    async with served(handler.handle) as port:
        page = await talk(port, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"default-src 'none'; script-src 'self'; style-src 'self'" in page
        body = page.partition(b"\r\n\r\n")[2]
        # The policy would stop these, so they must not be there.
        assert b"style=" not in body
        assert b"<script>" not in body
        assert b" onclick" not in body
        for path in (b"/page.css", b"/page.js"):
            answer = await talk(port, b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % path)
            assert status(answer) == 200


async def test_quitting_is_asked_for_by_post_only() -> None:
    handler, asked = admin()
    async with served(handler.handle) as port:
        answer = await talk(port, b"GET /quitquitquit HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (status(answer), asked) == (405, [])
        answer = await talk(port, b"POST /quitquitquit HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (status(answer), asked) == (200, ["quit"])
        assert answer.endswith(b"shutdown now\n")
