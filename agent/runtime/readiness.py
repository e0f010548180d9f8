"""Readiness: which tasks the agent still waits for, and the port that tells.

GET /healthz/ready on 15021, IPv4 and IPv6, in the agent's own netns, as
ztunnel's: 200 `ready`, or 500 and the pending tasks, sorted. Anyone in the
node's network may connect, so clients are few, short and cut off in time.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

import h11
import trio

from meshbpf.agent.core.errors import MeshbpfError

MAX_CLIENTS = 64
CLIENT_S = 5.0
"""A whole exchange has this long; kubelet's own limit is 1 s by default."""
_MAX_HEAD_BYTES = 8 * 1024


class Readiness:
    """What has to be there before the agent is ready.

    Tasks are done once (`done`); conditions are asked each time, so that an
    agent can become unready again.
    """

    def __init__(self, *tasks: str) -> None:
        self._pending = set(tasks)
        self._conditions: dict[str, Callable[[], bool]] = {}

    def done(self, task: str) -> None:
        """Strike a task off. Twice is as good as once."""
        self._pending.discard(task)

    def require(self, task: str, condition: Callable[[], bool]) -> None:
        """`task` is pending whenever `condition` is false."""
        self._conditions[task] = condition

    def pending(self) -> tuple[str, ...]:
        """Names of what is not there, sorted; empty means ready."""
        failing = {task for task, holds in self._conditions.items() if not holds()}
        return tuple(sorted(self._pending | failing))


@dataclass(frozen=True, slots=True)
class _Answer:
    status: HTTPStatus
    body: bytes


def open_listener(port: int) -> socket.socket:
    """A listening socket for both families (IPv4 alone where IPv6 is off).

    Raises MeshbpfError (port-in-use) when somebody has the port.
    """
    for family, address in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):
        try:
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            if error.errno != errno.EAFNOSUPPORT or family == socket.AF_INET:
                raise
            continue
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.bind((address, port))
            sock.listen(MAX_CLIENTS)
        except OSError as error:
            sock.close()
            if error.errno == errno.EADDRNOTAVAIL and family == socket.AF_INET6:
                continue  # disable_ipv6
            if error.errno == errno.EADDRINUSE:
                raise MeshbpfError(
                    "port-in-use",
                    f"readiness port {port} is taken in the agent's network namespace",
                    f"`ss -ltnp sport = :{port}` says by whom; one agent runs per namespace",
                ) from error
            raise
        else:
            return sock
    raise MeshbpfError("no-ip", "this network namespace has neither IPv4 nor IPv6")


async def serve(listener: socket.socket, readiness: Readiness) -> None:
    """Answer until cancelled; closes the listener."""
    slots = trio.CapacityLimiter(MAX_CLIENTS)

    async def handle(stream: trio.SocketStream) -> None:
        await _one_client(stream, readiness, slots)

    with trio.socket.from_stdlib_socket(listener) as trio_listener:
        await trio.serve_listeners(handle, [trio.SocketListener(trio_listener)])


async def _one_client(
    stream: trio.SocketStream, readiness: Readiness, slots: trio.CapacityLimiter
) -> None:
    async with stream:
        try:
            slots.acquire_nowait()
        except trio.WouldBlock:
            return
        # The slot is borrowed by this task and given back by it.
        try:
            with trio.move_on_after(CLIENT_S):
                await _exchange(stream, readiness)
        except (trio.BrokenResourceError, h11.ProtocolError):
            return  # the client went away or does not speak HTTP
        finally:
            slots.release()


async def _exchange(stream: trio.SocketStream, readiness: Readiness) -> None:
    http = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEAD_BYTES)
    request: h11.Request | None = None
    while request is None:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(await stream.receive_some(_MAX_HEAD_BYTES))
        elif isinstance(event, h11.Request):
            request = event
        else:
            return
    answer = _answer(request, readiness)
    headers = [
        ("content-type", "text/plain; charset=utf-8"),
        ("content-length", str(len(answer.body))),
        ("connection", "close"),
    ]
    head = (
        http.send(
            h11.Response(
                status_code=answer.status.value,
                headers=headers,
                reason=answer.status.phrase.encode(),
            )
        )
        or b""
    )
    # h11 lets a HEAD request's body through only when it is empty.
    body = b"" if request.method == b"HEAD" else http.send(h11.Data(data=answer.body)) or b""
    await stream.send_all(head + body)
    await stream.send_eof()
    # Read what is left, or the close becomes a reset that eats the answer.
    with trio.move_on_after(1.0):
        while await stream.receive_some(_MAX_HEAD_BYTES):
            pass


def _answer(request: h11.Request, readiness: Readiness) -> _Answer:
    path = request.target.partition(b"?")[0]
    if path != b"/healthz/ready":
        return _Answer(HTTPStatus.NOT_FOUND, b"try /healthz/ready\n")
    if request.method not in (b"GET", b"HEAD"):
        return _Answer(HTTPStatus.METHOD_NOT_ALLOWED, b"GET only\n")
    pending = readiness.pending()
    if pending:
        lines = "".join(f"{task}\n" for task in pending)
        return _Answer(HTTPStatus.INTERNAL_SERVER_ERROR, f"not ready, pending:\n{lines}".encode())
    return _Answer(HTTPStatus.OK, b"ready\n")
