"""Callbacks on sockets, run inside trio's own wait for I/O: the loop of the relay.

A relayed byte needs no task: what is to be done with a readable socket is the
same each time, and switching to a task costs more than doing it. So the
sockets of open streams and tunnels are registered here, edge-triggered and
once for their life, and a callback does the work. Tasks stay for all that
waits for something: dials, handshakes, a stream's answer, its end. See
docs/adr/0004-relay-loop.md for the figures.

`_Inlet` stands where trio keeps its epoll object and takes out the events of
our sockets before trio sees the rest; when a callback has woken a task, it
returns at once. That place is no public interface of trio, so `current` looks
whether everything is where it was, and else serves the callbacks from a task
that waits for an epoll of our own, at the cost of one switch for each wait.

Rules for callbacks: they never wait, and meet EAGAIN without surprise (an
event may be a socket's that had the same number); they read until EAGAIN or a
short read, for there is no second event for the same bytes; whoever has more
to do than is fair asks for another turn with `again`. `remove` comes before
the socket is closed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import time
from collections.abc import Callable, Sized
from typing import Any, Protocol

import trio
from trio.lowlevel import RunVar

from meshbpf.agent.runtime import native

log = logging.getLogger(__name__)

READABLE = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
ENDED = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
"""The peer sends no more, or the connection broke."""
BROKEN = select.EPOLLHUP | select.EPOLLERR
WRITABLE = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR

_READING = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
_BOTH = _READING | select.EPOLLOUT
_MAX_EVENTS = 256

Callback = Callable[[int], None]
"""Given the flags of epoll_wait(2)."""
Turn = Callable[[], None]
Events = list[tuple[int, int]]


class Epoll(Protocol):
    """The part of select.epoll that is used here."""

    def poll(self, timeout: float, maxevents: int) -> Events:
        """See epoll_wait(2); seconds."""
        ...

    def register(self, fd: int, eventmask: int) -> None:
        """See epoll_ctl(2)."""
        ...

    def modify(self, fd: int, eventmask: int) -> None:
        """See epoll_ctl(2)."""
        ...

    def unregister(self, fd: int) -> None:
        """See epoll_ctl(2)."""
        ...


class Reactor:
    """All callbacks of one trio run. Used from its thread only."""

    def __init__(self, epoll: Epoll) -> None:
        self._epoll = epoll
        self._callbacks: dict[int, Callback] = {}
        self._turns: list[Turn] = []
        self.rounds = 0
        """Waits that have begun, where the engine is."""
        self.engine: native.Engine | None = None
        """What deals with usual events in C, where there is such a thing."""

    def add(self, fd: int, callback: Callback, *, writing: bool = False) -> None:
        """Call `callback` whenever `fd` becomes readable, ends or breaks; at once if it is.

        With `writing` also when it becomes writable. No task may wait for it.
        """
        self._callbacks[fd] = callback
        flags = _BOTH if writing else _READING
        try:
            self._epoll.register(fd, flags)
        except FileExistsError:
            self._epoll.modify(fd, flags)

    def watch_writable(self, fd: int) -> None:
        """From now on call it for becoming writable as well; at once if it is."""
        self._epoll.modify(fd, _BOTH)

    def remove(self, fd: int) -> None:
        """No more calls. The kernel forgets the socket when it is closed, which comes next."""
        self._callbacks.pop(fd, None)
        if self.engine is not None:
            self.engine.forget(fd)

    def accelerate(self, handle: native.Handle) -> None:
        """Have the engine act on what it can, before the callback of the handle's descriptor."""
        if self.engine is not None:
            self.engine.watch(handle)

    def again(self, turn: Turn) -> None:
        """Call `turn` once, after the sockets that are ready now."""
        self._turns.append(turn)

    def before_waiting(self, turn: Turn) -> None:
        """Call `turn` once, when all that can run now has run: what is done for many at once."""
        self.again(turn)

    @property
    def waiting(self) -> bool:
        """A turn has been asked for: do not wait for I/O."""
        return bool(self._turns)

    def serve(self, events: Events) -> Events:
        """Act on our events and on all turns due; what is left is not ours."""
        others: Events = []
        find = self._callbacks.get
        turns = self._turns
        if turns:
            self._turns = []
        for event in events:
            callback = find(event[0])
            if callback is None:
                others.append(event)
                continue
            try:
                callback(event[1])
            except Exception as error:  # boundary: a bug costs one connection, and is seen
                log.exception("a socket's callback failed: %s", error)
                self.remove(event[0])
        for turn in turns:
            try:
                turn()
            except Exception as error:  # the same boundary
                log.exception("a turn failed: %s", error)
        return others


class _Inside(Reactor):
    """Served from trio's own wait."""

    def __init__(self, epoll: select.epoll) -> None:
        super().__init__(epoll)
        self._last: list[Turn] = []

    def before_waiting(self, turn: Turn) -> None:
        self._last.append(turn)

    def finish(self) -> None:
        """The last moment before a wait."""
        while self._last:
            last, self._last = self._last, []
            for turn in last:
                try:
                    turn()
                except Exception as error:  # the same boundary as in `serve`
                    log.exception("a turn failed: %s", error)


class _Inlet:
    """An epoll object for trio that keeps our events to itself."""

    def __init__(self, epoll: select.epoll, runnable: Sized) -> None:
        self.reactor = _Inside(epoll)
        engine = self.reactor.engine = native.engine(epoll)
        log.info("the relay's loop is in %s", "Python" if engine is None else "C")
        self._poll = epoll.poll if engine is None else engine.poll
        self._runnable = runnable
        # The rest is trio's alone.
        self.register = epoll.register
        self.modify = epoll.modify
        self.unregister = epoll.unregister
        self.close = epoll.close
        self.fileno = epoll.fileno

    def poll(self, timeout: float, maxevents: int) -> Events:
        """As trio wants it: nothing after `timeout`, unless a task can run before."""
        reactor, maxevents = self.reactor, max(maxevents, _MAX_EVENTS)
        deadline = time.monotonic() + timeout
        while True:
            reactor.finish()
            reactor.rounds += 1
            if self._runnable:
                timeout = 0
            others = reactor.serve(self._poll(0 if reactor.waiting else timeout, maxevents))
            if others or self._runnable:
                return others
            timeout = deadline - time.monotonic()
            if timeout <= 0:
                return others


_current: RunVar[Reactor] = RunVar("relay reactor")


def current() -> Reactor:
    """The reactor of this trio run; made when first asked for."""
    try:
        return _current.get()
    except LookupError:
        reactor = _inside_trio() or _beside_trio()
        _current.set(reactor)
        return reactor


def _inside_trio() -> Reactor | None:
    """Put an inlet into trio; None when this trio is not made as we know it."""
    try:
        from trio._core._run import GLOBAL_RUN_CONTEXT
    except ImportError:
        return None
    runner: Any = getattr(GLOBAL_RUN_CONTEXT, "runner", None)
    manager: Any = getattr(runner, "io_manager", None)
    epoll, runnable = getattr(manager, "_epoll", None), getattr(runner, "runq", None)
    if not isinstance(epoll, select.epoll) or runnable is None or runner.is_guest:
        return None
    inlet = _Inlet(epoll, runnable)
    manager._epoll = inlet
    return inlet.reactor


class _Beside(Reactor):
    """Served by a task, which a turn that is asked for must wake."""

    def __init__(self, epoll: select.epoll) -> None:
        super().__init__(epoll)
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # Edge-triggered: nobody has to read it.
        epoll.register(self._bell, select.EPOLLIN | select.EPOLLET)

    def again(self, turn: Turn) -> None:
        if not self.waiting:
            os.eventfd_write(self._bell, 1)
        super().again(turn)

    def close(self) -> None:
        os.close(self._bell)


def _beside_trio() -> Reactor:
    epoll = select.epoll()
    reactor = _Beside(epoll)
    trio.lowlevel.spawn_system_task(_serve, epoll, reactor)
    return reactor


async def _serve(epoll: select.epoll, reactor: _Beside) -> None:
    with epoll, contextlib.closing(reactor):
        while True:
            await trio.lowlevel.wait_readable(epoll)
            reactor.serve(epoll.poll(0, _MAX_EVENTS))
            while reactor.waiting:
                await trio.lowlevel.checkpoint()
                reactor.serve(epoll.poll(0, _MAX_EVENTS))
