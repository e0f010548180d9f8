"""Replacing a running agent by a new one: the new one's side, and what is left of the old.

A predecessor that drains is known by its end of the channel, which closes
with it, and by a control socket of its own, at which it answers as any agent
does. Its connections are listed with ours; when we are replaced in our turn,
our successor gets the channels of those that are still there.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec
import trio

from meshbpf.agent import api
from meshbpf.agent.api_client import call_at
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.handover import (
    Channel,
    End,
    Go,
    HandoverError,
    Inheritance,
    Ready,
    Retired,
    Serving,
    unexpected,
)
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.runtime.reload import receive

FD_PREFIX = "predecessor/"
LOOK_S = 1.0
"""How often a predecessor is asked how much it carries."""
ASK_LIMIT_S = 5.0

log = Log("reload")


@dataclass(slots=True, eq=False)
class Predecessor:
    """One that drains."""

    pid: int
    channel: Channel
    socket: Path
    connections: int = 0
    ends_at: datetime | None = None

    def describe(self) -> api.PredecessorInfo:
        """For `status`."""
        return api.PredecessorInfo(pid=self.pid, connections=self.connections, ends_at=self.ends_at)


class Predecessors:
    """Those of this agent that are still there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[int, Predecessor] = {}
        self._nursery: trio.Nursery | None = None

    def __iter__(self) -> Iterator[Predecessor]:
        return iter(self._known.values())

    def inherit(self, inheritance: Inheritance) -> None:
        """Take over those that our predecessor knew."""
        for pid, fds in inheritance.take_prefixed(FD_PREFIX).items():
            for fd in fds:
                self.add(int(pid), Channel.of(socket.socket(fileno=fd)))

    def add(self, pid: int, channel: Channel) -> None:
        """This process has been replaced by us."""
        path = self._folder / f"predecessor-{pid}.sock"
        known = self._known[pid] = Predecessor(pid, channel, path)
        if self._nursery is not None:
            self._nursery.start_soon(self._follow, known)

    def descriptors(self) -> Iterator[tuple[str, int]]:
        """For our successor."""
        for known in self:
            yield f"{FD_PREFIX}{known.pid}", known.channel.fileno()

    def hand_over(self) -> None:
        """Our successor follows them."""
        known, self._known = self._known, {}
        for one in known.values():
            one.channel.close()

    async def watch(self) -> None:
        """Follow each of them to its end, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for known in list(self):
                nursery.start_soon(self._follow, known)
            await trio.sleep_forever()

    async def end(self, limit_s: float) -> None:
        """Have all of them end what is left; wait for that, but not longer than `limit_s`.

        Not while `watch` runs.
        """
        for known in list(self):
            with suppress(HandoverError, BlockingIOError):
                known.channel.send(End())
        with trio.move_on_after(limit_s):
            for known in list(self):
                await _closed(known.channel)

    async def connections(
        self, request: api.ConnectionsRequest
    ) -> tuple[list[api.ConnectionInfo], int]:
        """What they carry, each under its process id, and how much that is in all."""
        found: list[api.ConnectionInfo] = []
        total = 0
        for known in list(self):
            try:
                answer = await trio.to_thread.run_sync(_ask, known.socket, request)
            except MeshbpfError as error:
                log.debug("a predecessor does not answer", pid=known.pid, error=error.what)
                continue
            found += (msgspec.structs.replace(one, agent=known.pid) for one in answer.connections)
            total += answer.total
        return found, total

    async def _follow(self, known: Predecessor) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._look, known)
            await _closed(known.channel)
            nursery.cancel_scope.cancel()
        self._known.pop(known.pid, None)
        known.channel.close()
        known.socket.unlink(missing_ok=True)  # it may have been killed
        log.info("predecessor has ended", pid=known.pid)

    async def _look(self, known: Predecessor) -> None:
        while True:
            try:
                status = await trio.to_thread.run_sync(
                    _ask_status, known.socket, abandon_on_cancel=True
                )
            except MeshbpfError as error:
                log.debug("a predecessor does not answer", pid=known.pid, error=error.what)
            else:
                known.connections, known.ends_at = status.connections, status.draining_until
            await trio.sleep(LOOK_S)


async def take_the_place(channel: Channel) -> None:
    """Say that all is ready and wait to be let in. Raises HandoverError when that does not come."""
    channel.send(Ready())
    message = await receive(channel)
    if not isinstance(message, Go):
        raise unexpected(message)


async def begin(channel: Channel) -> bool:
    """We serve. Whether the predecessor has retired in order, or ended before it could say so."""
    channel.send(Serving())
    try:
        message = await receive(channel)
    except HandoverError:
        # Then we are alone, and the service manager may end us with it.
        log.warning("predecessor ended while it handed over")
        return False
    if not isinstance(message, Retired):
        raise unexpected(message)
    return True


def sweep(folder: Path, keep: Iterable[int] = ()) -> None:
    """Remove sockets of predecessors that were killed."""
    kept = {f"predecessor-{pid}.sock" for pid in keep}
    for path in folder.glob("predecessor-*.sock"):
        if path.name not in kept:
            path.unlink(missing_ok=True)


async def _closed(channel: Channel) -> None:
    """Return when the other side has gone."""
    while True:
        try:
            _, fds = channel.receive()
        except BlockingIOError:
            await trio.lowlevel.wait_readable(channel)
            continue
        except HandoverError:
            return
        for fd in fds:
            os.close(fd)


def _ask(path: Path, request: api.ConnectionsRequest) -> api.ConnectionsResult:
    return call_at(path, request, timeout_s=ASK_LIMIT_S)


def _ask_status(path: Path) -> api.StatusResult:
    return call_at(path, api.StatusRequest(), timeout_s=ASK_LIMIT_S)
