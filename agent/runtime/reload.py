"""Replacing a running agent by a new one: the old one's side.

    freeze    attach and detach wait: the record of pods must not change
    spawn     the same command line, environment and standard streams; it is
              orphaned at birth, so that the service manager, or init, is its
              parent and hears of its end
    offer     listeners of pods and of our own, namespaces, the lock
    Ready     the successor has its programs, pods and certificates
    Go        our accept loops stand still; dials wait in the shared queues
    Serving   the successor accepts: there is no way back from here
    retire    heartbeat, kernel maps, sockets and the service are its; what we
              carry goes on until it ends or the deadline comes

Until Serving every failure is taken back: the successor is ended, our gate
opens again, and whoever asked is told why.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from typing import TypeVar

import trio

import meshbpf
from meshbpf.agent import api
from meshbpf.agent.core.errors import Exit, MeshbpfError
from meshbpf.agent.handover import (
    ENVIRONMENT,
    FDS_PER_PACKET,
    Channel,
    Descriptors,
    Failed,
    Go,
    HandoverError,
    Hello,
    Message,
    Offer,
    Ready,
    Retired,
    Serving,
    unexpected,
)
from meshbpf.agent.runtime.logs import Log

HELLO_S = 30.0
"""Python's start and the reading of the configuration, on a busy machine."""
READY_S = 120.0
"""A new version compiles its programs first."""
SERVING_S = 10.0

# What a service manager meant for this process alone.
_NOT_INHERITED = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID")

M = TypeVar("M", bound=Message)

log = Log("reload")


class SuccessorError(MeshbpfError):
    """The new agent could not take over; this one goes on."""

    def __init__(self, error: MeshbpfError, exit_status: Exit) -> None:
        super().__init__(
            error.code, f"the new agent did not start: {error.what}; this one goes on", error.hint
        )
        self.exit_status = exit_status


@dataclass(frozen=True, slots=True)
class House:
    """What is handed over, and the steps of it that are others' business."""

    state_dir: str
    agent_id: str
    frozen: Callable[[], AbstractAsyncContextManager[None]]
    """For its time no pod comes or goes."""
    descriptors: Callable[[], Iterable[tuple[str, int]]]
    pause: Callable[[], None]
    """Accept nothing."""
    resume: Callable[[], None]
    retire: Callable[[int], None]
    """The process of that number is the agent now. Returns at once; the end is begun."""
    carried: Callable[[], int]


class Reloader:
    """Answers the verb `reload`, one at a time."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._busy = False
        self.successor: Channel | None = None
        """Who replaced us; None while nobody has."""

    async def reload(self, _request: api.ReloadRequest) -> api.ReloadResult:
        """Start a successor and hand everything over. Raises MeshbpfError; then nothing changed."""
        if self._busy or self.successor is not None:
            raise MeshbpfError("reloading", "a reload is under way", "wait for its end")
        self._busy = True
        began = time.monotonic()
        try:
            async with self._house.frozen():
                hello = await self._replace()
        finally:
            self._busy = False
        return api.ReloadResult(
            pid=hello.pid,
            version=hello.version,
            predecessor=os.getpid(),
            connections=self._house.carried(),
            took_s=round(time.monotonic() - began, 3),
        )

    async def _replace(self) -> Hello:
        channel = await _spawn()
        hello: Hello | None = None
        try:
            hello = await _expect(channel, Hello, HELLO_S)
            log.info("successor started", pid=hello.pid, version=hello.version)
            await self._offer(channel)
            await _expect(channel, Ready, READY_S)
            self._house.pause()
            channel.send(Go())
            await _expect(channel, Serving, SERVING_S)
        except BaseException as error:
            channel.close()
            if hello is not None:
                # It may hang where it does not look at the channel.
                with suppress(ProcessLookupError):
                    os.kill(hello.pid, signal.SIGKILL)
            self._house.resume()
            if isinstance(error, MeshbpfError):
                log.error("reload failed, this agent goes on", cause=error)
                raise
            raise
        # Not a step of the following may wait or fail: two agents serve now.
        self._house.retire(hello.pid)
        self.successor = channel
        try:
            channel.send(Retired())
        except (HandoverError, BlockingIOError) as error:
            log.error("successor does not listen", cause=error, pid=hello.pid)
        log.info("replaced, draining", successor=hello.pid, connections=self._house.carried())
        return hello

    async def _offer(self, channel: Channel) -> None:
        house = self._house
        found = list(house.descriptors())
        for start in range(0, len(found), FDS_PER_PACKET):
            part = found[start : start + FDS_PER_PACKET]
            names = tuple(name for name, _ in part)
            await _send(channel, Descriptors(names), [fd for _, fd in part])
        await _send(
            channel,
            Offer(
                pid=os.getpid(),
                version=meshbpf.__version__,
                state_dir=house.state_dir,
                agent_id=house.agent_id,
            ),
        )


async def _spawn() -> Channel:
    """Start this program once more, with the other end of the channel that is returned."""
    ours, theirs = Channel.pair()
    try:
        environ = {name: text for name, text in os.environ.items() if name not in _NOT_INHERITED}
        environ[ENVIRONMENT] = str(theirs.fileno())
        # setsid forks and ends: the agent's parent is then init, which waits
        # for it, and not we, who go.
        setsid = shutil.which("setsid") or "/usr/bin/setsid"
        await trio.run_process(
            [setsid, "--fork", sys.executable, *sys.orig_argv[1:]],
            stdin=None,
            env=environ,
            pass_fds=[theirs.fileno()],
        )
    except BaseException as error:
        ours.close()
        if isinstance(error, OSError):
            raise HandoverError("no-successor", f"no new agent can be started: {error}") from error
        raise
    finally:
        theirs.close()
    return ours


async def _send(channel: Channel, message: Message, descriptors: Iterable[int] = ()) -> None:
    fds = list(descriptors)
    with trio.move_on_after(HELLO_S):
        while True:
            try:
                channel.send(message, fds)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(channel)
            else:
                return
    raise _silent(HELLO_S)


async def _expect(channel: Channel, kind: type[M], limit_s: float) -> M:
    """The next message, which has to be of this kind. Raises SuccessorError for `Failed`."""
    with trio.move_on_after(limit_s):
        message = await receive(channel)
        if isinstance(message, Failed):
            error = message.error
            status = Exit(error.exit_status) if error.exit_status in set(Exit) else Exit.FAILED
            raise SuccessorError(MeshbpfError(error.code, error.what, error.hint), status)
        if not isinstance(message, kind):
            raise unexpected(message)
        return message
    raise _silent(limit_s)


async def receive(channel: Channel) -> Message:
    """The next message; its descriptors, if any, are closed. Raises HandoverError at the end."""
    while True:
        try:
            message, fds = channel.receive()
        except BlockingIOError:
            await trio.lowlevel.wait_readable(channel)
            continue
        for fd in fds:
            os.close(fd)
        return message


def _silent(limit_s: float) -> HandoverError:
    return HandoverError(
        "successor-silent",
        f"the new agent said nothing for {limit_s:.0f} s; this one goes on",
        "the log has what it did meanwhile",
    )
