"""Readiness: which tasks the agent still waits for, and the port that tells.

GET /healthz/ready on 15021, IPv4 and IPv6, in the agent's own netns, as
ztunnel's: 200 `ready`, or 500 and the pending tasks, sorted.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from http import HTTPStatus

import trio

from meshbpf.agent.runtime import httpd
from meshbpf.agent.runtime.httpd import Request, Response

CLIENT_S = httpd.CLIENT_S
"""Kubelet's own limit is 1 s by default."""


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


def open_listener(port: int) -> socket.socket:
    """A listening socket for both families (IPv4 alone where IPv6 is off).

    Raises MeshbpfError (port-in-use) when somebody has the port.
    """
    return httpd.open_listener(port, "readiness")


async def serve(
    listener: socket.socket, readiness: Readiness, clients: trio.Nursery | None = None
) -> None:
    """Answer until cancelled; closes the listener. `clients` as in `httpd.serve`."""

    async def handle(request: Request) -> Response:
        return answer(request, readiness)

    await httpd.serve([listener], handle, clients, client_s=CLIENT_S)


def answer(request: Request, readiness: Readiness) -> Response:
    """The answer to one request."""
    if request.path != "/healthz/ready":
        return Response(HTTPStatus.NOT_FOUND, "try /healthz/ready\n")
    if request.method not in ("GET", "HEAD"):
        return Response(HTTPStatus.METHOD_NOT_ALLOWED, "GET only\n")
    pending = readiness.pending()
    if pending:
        lines = "".join(f"{task}\n" for task in pending)
        return Response(HTTPStatus.INTERNAL_SERVER_ERROR, f"not ready, pending:\n{lines}")
    return Response(HTTPStatus.OK, "ready\n")
