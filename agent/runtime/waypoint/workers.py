"""Several workers of one waypoint: processes that share the HBONE port.

The parent starts them, starts a dead one again, and answers for all on 15020
and 15021: it hands each worker two loopback listeners of its own and asks
there. A waypoint is ready when all its workers are; a sample that several
workers have is summed.
"""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from http import HTTPStatus

import h11
import trio

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.runtime import httpd, readiness
from meshbpf.agent.runtime.exposition import TEXT
from meshbpf.agent.runtime.httpd import Request, Response
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.runtime.main_loop import SIGNALS, stop_on_signal
from meshbpf.agent.waypoint_config import WaypointSettings

log = Log("waypoint")

_PAGES = "MESHBPF_WAYPOINT_PAGES"
"""How a worker is told the descriptors of its listeners: STATS,READINESS."""
_RESTART_S = 1.0
_ASK_S = 2.0
_STOP_S = 8.0
_PAGE_LIMIT_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class PageListeners:
    """Where a process answers for itself."""

    stats: socket.socket | None
    readiness: socket.socket


def inherited_pages() -> PageListeners | None:
    """Those that the parent has handed to this worker; None in a process that has no parent."""
    told = os.environ.pop(_PAGES, "")
    if not told:
        return None
    stats, ready = (socket.socket(fileno=int(each)) for each in told.split(","))
    return PageListeners(stats, ready)


async def supervise(settings: WaypointSettings) -> None:
    """Run all workers until SIGTERM or SIGINT."""
    listeners = [readiness.open_listener(settings.readiness_port)]
    stats = httpd.open_listener(settings.stats_port, "stats") if settings.stats_port else None
    workers = [_Worker(number) for number in range(settings.workers)]
    summed = _Summed(workers)
    with trio.open_signal_receiver(*SIGNALS) as signals:
        async with trio.open_nursery() as nursery:
            for worker in workers:
                nursery.start_soon(worker.keep)
            nursery.start_soon(httpd.serve, listeners, summed.ready)
            if stats is not None:
                nursery.start_soon(httpd.serve, [stats], summed.metrics)
            await stop_on_signal(log, signals, nursery.cancel_scope)


class _Worker:
    def __init__(self, number: int) -> None:
        self.number = number
        self.stats = _loopback()
        self.readiness = _loopback()

    async def keep(self) -> None:
        """Run it, again and again."""
        while True:
            process = await trio.lowlevel.open_process(
                [*_command(), "--worker", str(self.number)],
                pass_fds=(self.stats.fileno(), self.readiness.fileno()),
                env={**os.environ, _PAGES: f"{self.stats.fileno()},{self.readiness.fileno()}"},
            )
            try:
                status = await process.wait()
            except trio.Cancelled:
                with trio.CancelScope(shield=True):
                    await _stop(process)
                raise
            log.error("worker ended, it is started again", worker=self.number, status=status)
            await trio.sleep(_RESTART_S)


async def _stop(process: trio.Process) -> None:
    process.terminate()
    with trio.move_on_after(_STOP_S):
        await process.wait()
        return
    process.kill()
    await process.wait()


class _Summed:
    """The two pages of all workers."""

    def __init__(self, workers: list[_Worker]) -> None:
        self._workers = workers

    async def ready(self, request: Request) -> Response:
        """200 when every worker says so."""
        if request.path != "/healthz/ready":
            return Response(HTTPStatus.NOT_FOUND, "try /healthz/ready\n")
        for worker in self._workers:
            status, body = await _ask(worker.readiness, "/healthz/ready")
            if status != HTTPStatus.OK:
                text = f"not ready: worker {worker.number}\n{body}"
                return Response(HTTPStatus.INTERNAL_SERVER_ERROR, text)
        return Response(HTTPStatus.OK, "ready\n")

    async def metrics(self, request: Request) -> Response:
        """The sum of all pages, in Prometheus' text format."""
        pages = []
        for worker in self._workers:
            status, body = await _ask(worker.stats, request.path)
            if status != HTTPStatus.OK:
                return Response(HTTPStatus.BAD_GATEWAY, f"worker {worker.number}: {body}")
            pages.append(body)
        return Response(HTTPStatus.OK, add_up(pages), TEXT)


def add_up(pages: list[str]) -> str:
    """One exposition from several: samples of one name and labels are summed."""
    order: dict[str, None] = {}
    sums: dict[str, float] = {}
    for page in pages:
        for line in page.splitlines():
            if line.startswith("#") or not line.strip():
                order.setdefault(line)
                continue
            name, _, value = line.rpartition(" ")
            order.setdefault(name)
            sums[name] = sums.get(name, 0.0) + float(value)
    lines = [
        line if line not in sums else f"{line} {_number(sums[line])}" for line in order if line
    ]
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)


def _command() -> list[str]:
    """This very command line."""
    return [sys.executable, "-m", "meshbpf", *sys.argv[1:]]


def _loopback() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    sock.bind(("127.0.0.1", 0))
    sock.listen(64)
    return sock


async def _ask(listener: socket.socket, path: str) -> tuple[int, str]:
    """GET from a worker: status and body; 0 when it does not answer."""
    host, port = listener.getsockname()
    http = h11.Connection(h11.CLIENT)
    body = bytearray()
    status = 0
    with trio.move_on_after(_ASK_S):
        try:
            async with await trio.open_tcp_stream(host, port) as stream:
                asked = h11.Request(method="GET", target=path, headers=[("host", "worker")])
                await stream.send_all(
                    (http.send(asked) or b"") + (http.send(h11.EndOfMessage()) or b"")
                )
                while len(body) < _PAGE_LIMIT_BYTES:
                    event = http.next_event()
                    if event is h11.NEED_DATA:
                        http.receive_data(await stream.receive_some(65536))
                    elif isinstance(event, h11.Response):
                        status = event.status_code
                    elif isinstance(event, h11.Data):
                        body += event.data
                    elif isinstance(event, h11.EndOfMessage):
                        return status, body.decode("utf-8", "replace")
        except (OSError, h11.ProtocolError, trio.BrokenResourceError, MeshbpfError) as error:
            return 0, f"{error}\n"
    return 0, "no answer\n"
