"""Telling the service manager how the agent is: ready, one line of status, the watchdog.

The watchdog is fed only by a whole turn through what must work: this task runs
in the event loop, so a stuck loop feeds nothing; the heartbeat's thread wrote
its last beat, and the kernel gave it back when it was asked, in a thread that
needed the same lock as every attach. An agent for which that fails is one that
the kernel takes for dead already; the manager then starts another.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Protocol

import trio

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.runtime.notify import Notifier, NotifyError

STATUS_S = 5.0
"""How often the status line is brought up to date, at most."""
TURNS_PER_WATCHDOG = 4
"""Three lost turns are no reason to end an agent."""

PATIENCE_S = 60.0
PATIENCE_EVERY_S = 15.0
"""While a control plane is awaited, the manager is asked this often to wait that long."""
_OF_OTHERS = frozenset({"mesh-state", "certificates"})
"""What an agent lacks through no fault of its own: another one would lack it too."""

STOP_MARGIN_S = 10.0
"""What an end takes beyond its draining, at most."""

log = Log("supervised")


class Supervised(Protocol):
    """What the manager is told about."""

    def status_line(self) -> str:
        """How the agent is, for people. Called in the event loop."""

    def datapath_answers(self) -> bool:
        """Whether the kernel side does its part. Called in a thread; may raise MeshbpfError."""


async def ask_for_patience(notifier: Notifier, pending: Callable[[], Collection[str]]) -> None:
    """Keep the manager from ending an agent that waits for a control plane, until cancelled.

    `pending` names what it lacks. A start that hangs in anything else runs into
    the unit's TimeoutStartSec, as it should.
    """
    while notifier.listens:
        await trio.sleep(PATIENCE_EVERY_S)
        missing = pending()
        if "bpf" not in missing and _OF_OTHERS.intersection(missing):
            status = f"not ready, pending {', '.join(missing)}"
            await _send(partial(notifier.starting, status, PATIENCE_S))


async def tell(
    notifier: Notifier,
    agent: Supervised,
    ends_within_s: Callable[[], float | None] = lambda: 0.0,
) -> None:
    """Say that the agent is ready, then keep the manager informed until cancelled.

    Then the end has begun, which takes `ends_within_s` at most; None: not the
    service's, for a successor is the service.
    """
    if not notifier.listens:
        return
    status = agent.status_line()
    await _send(partial(notifier.ready, status))
    pause = STATUS_S
    if notifier.watchdog_s is not None:
        pause = min(STATUS_S, notifier.watchdog_s / TURNS_PER_WATCHDOG)
    try:
        await _keep_telling(notifier, agent, status, pause)
    finally:
        # At once and not in a thread: this is no place to wait for one.
        within_s = ends_within_s()
        try:
            if within_s is not None:
                notifier.stopping("stopping", within_s)
        except NotifyError as error:
            log.error("service manager cannot be told", cause=error)


async def _keep_telling(notifier: Notifier, agent: Supervised, status: str, pause_s: float) -> None:
    fed = True
    while True:
        healthy = notifier.watchdog_s is None or await _answers(agent)
        if healthy and notifier.watchdog_s is not None:
            await _send(notifier.alive)
        elif not healthy and fed:
            log.error("data path does not answer: watchdog is not fed")
        fed = healthy
        fresh = agent.status_line()
        if fresh != status:
            status = fresh
            await _send(partial(notifier.status, status))
        await trio.sleep(pause_s)


async def _answers(agent: Supervised) -> bool:
    try:
        return await trio.to_thread.run_sync(agent.datapath_answers)
    except MeshbpfError as error:
        log.error("data path gives an error", cause=error)
        return False


async def _send(message: Callable[[], None]) -> None:
    try:
        await trio.to_thread.run_sync(message)
    except NotifyError as error:
        # A manager that hangs is no reason to stop serving; if it comes back
        # too late it will end us for the missing watchdog, as it should.
        log.error("service manager cannot be told", cause=error)
