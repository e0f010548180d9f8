"""From the agent's first moment as the service to its last, alone or in a row of agents.

Begin: answer at our sockets and start; or start, and then take the place of
the predecessor. End: drain under the termination deadline; or, when a
successor has our place, drain under the reload deadline, with a control
socket of our own. `app.py` says when.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Protocol

import trio

from meshbpf.agent import api
from meshbpf.agent.config import Settings
from meshbpf.agent.core.state import MeshState
from meshbpf.agent.handover import Channel, End, HandoverError, Inheritance
from meshbpf.agent.runtime import supervised, takeover
from meshbpf.agent.runtime.agent import Agent
from meshbpf.agent.runtime.control import ControlServer
from meshbpf.agent.runtime.fronts import Fronts
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.runtime.notify import Notifier, NotifyError
from meshbpf.agent.runtime.reload import House, Reloader, receive
from meshbpf.agent.runtime.state_dir import StateDir

LAST_ANSWERS_S = 2.0
"""How long those who are being answered may keep the agent from ending."""

log = Log("app")


class Opened(Protocol):
    """What `app.py` has prepared, as far as it is used here."""

    @property
    def settings(self) -> Settings:
        """What `run` was told."""

    @property
    def state_dir(self) -> StateDir:
        """Ours, or ours and our predecessor's."""

    @property
    def state(self) -> MeshState | None:
        """The first one, if it is known already."""

    @property
    def control(self) -> ControlServer:
        """With the agent's verbs."""

    @property
    def fronts(self) -> Fronts:
        """Opened, not served."""

    @property
    def notifier(self) -> Notifier:
        """Held while a predecessor is the service."""

    @property
    def predecessor(self) -> Channel | None:
        """Whose place we take."""

    @property
    def inheritance(self) -> Inheritance | None:
        """What it has handed over."""


class Life:
    """One agent's."""

    def __init__(self, opened: Opened, agent: Agent, services: trio.Nursery) -> None:
        self._opened = opened
        self._agent = agent
        self._services = services
        self._replaced = trio.Event()
        self._reloader = Reloader(
            House(
                state_dir=str(opened.state_dir.path),
                agent_id=opened.state_dir.agent_id,
                frozen=agent.frozen,
                descriptors=self._descriptors,
                pause=agent.gate.close,
                resume=agent.gate.open,
                retire=self._retire,
                carried=agent.carried,
            )
        )
        opened.control.handle(api.ReloadRequest, self._reloader.reload)

    # --- begin ----------------------------------------------------------------

    async def begin(self) -> None:
        """Start, and be the service. Raises MeshbpfError."""
        opened, agent = self._opened, self._agent
        if opened.predecessor is None or opened.inheritance is None:
            self._serve_fronts()
            async with trio.open_nursery() as waiting:
                waiting.start_soon(
                    supervised.ask_for_patience, opened.notifier, agent.readiness.pending
                )
                await agent.start(opened.state)
                waiting.cancel_scope.cancel()
            return
        agent.gate.close()
        agent.predecessors.inherit(opened.inheritance)
        await agent.start(opened.state)
        await takeover.take_the_place(opened.predecessor)
        agent.gate.open()
        self._serve_fronts()
        await takeover.begin(opened.predecessor)
        opened.state_dir.sign()
        agent.predecessors.add(opened.inheritance.pid, opened.predecessor)
        log.info("taken over", predecessor=opened.inheritance.pid)
        try:
            await trio.to_thread.run_sync(opened.notifier.release)
        except NotifyError as error:
            log.error("service manager cannot be told", cause=error)

    def _serve_fronts(self) -> None:
        agent, services = self._agent, self._services
        services.start_soon(self._opened.fronts.serve, agent.readiness, agent.monitoring, services)

    async def tell_manager(self) -> None:
        """Keep the service manager informed, until cancelled."""
        await supervised.tell(
            self._opened.notifier,
            self._agent,
            ends_within_s=lambda: None if self._is_replaced else self._longest_end_s(),
        )

    def _longest_end_s(self) -> float:
        return self._opened.settings.termination_deadline_s + supervised.STOP_MARGIN_S

    # --- hand over ------------------------------------------------------------

    @property
    def _is_replaced(self) -> bool:
        return self._replaced.is_set()

    async def until_replaced(self, work: trio.CancelScope) -> None:
        """End the agent's work once a successor has taken over."""
        await self._replaced.wait()
        work.cancel()

    def _descriptors(self) -> Iterator[tuple[str, int]]:
        yield "lock", self._opened.state_dir.lock_fd
        yield from self._opened.fronts.descriptors()
        yield from self._agent.descriptors()

    def _retire(self, successor: int) -> None:
        self._opened.fronts.hand_over()
        self._agent.retire()
        try:
            self._opened.notifier.main_pid(successor)
        except NotifyError as error:
            log.error("service manager cannot be told of the successor", cause=error)
        self._replaced.set()

    # --- end ------------------------------------------------------------------

    async def end(self, signals: AsyncIterator[int]) -> None:
        """Drain and let go, shielded. A signal, or the successor's word, makes it hurry."""
        hurry = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_hurry_on_signal, signals, hurry)
            if not self._is_replaced:
                await self._agent.stop(hurry)
            else:
                successor = self._reloader.successor
                if successor is not None:
                    nursery.start_soon(_hurry_when_told, successor, hurry)
                await self._drain_apart(hurry)
            nursery.cancel_scope.cancel()
        with trio.move_on_after(LAST_ANSWERS_S):
            await self._opened.control.quiet()

    async def _drain_apart(self, hurry: trio.CancelScope) -> None:
        control = self._opened.control
        control.move(self._opened.state_dir.predecessor_socket(os.getpid()))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(control.serve, control.open())
            await self._agent.drain(hurry)
            nursery.cancel_scope.cancel()


async def _hurry_on_signal(signals: AsyncIterator[int], hurry: trio.CancelScope) -> None:
    async for number in signals:
        log.info("draining no longer", signal=signal.Signals(number).name)
        hurry.cancel()


async def _hurry_when_told(successor: Channel, hurry: trio.CancelScope) -> None:
    try:
        while not isinstance(await receive(successor), End):
            pass
    except HandoverError:
        return  # it ended; what we carry need not
    log.info("draining no longer, says the successor")
    hurry.cancel()
