"""Follows the pods that were attached by name through their lives.

A pod's sandbox dies (its first process is killed, the kubelet stops it) and
another takes its name. The network namespace alone does not tell: its file
outlives a killed sandbox until the runtime tidies up. So the runtime is asked
which sandboxes are READY: at each of its events where it has them, and at a
gentle pace everywhere, for one list request costs it a few milliseconds.

A runtime that does not answer says nothing about its pods, which run on
without it: attachments stay, and it is tried again with growing pauses.
"""

from __future__ import annotations

import random

import trio

from meshbpf.agent.core.errors import MeshbpfError, only_known
from meshbpf.agent.runtime.cri import CriSession
from meshbpf.agent.runtime.locate import Locator, of_sandbox
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.runtime.pods import PodManager
from meshbpf.agent.wire.grpc import GrpcError, Status

POLL_S = 1.0
POLL_WITH_EVENTS_S = 15.0
"""Events may be lost while a runtime restarts: look by ourselves now and then."""
SETTLE_S = 0.05
"""A pod that starts makes several events: one look for all of them."""
RETRY_FIRST_S = 0.5
RETRY_MOST_S = 30.0

log = Log("cri")


class NamedPods:
    """The watch over pods attached by name; asks nobody while there are none."""

    def __init__(self, manager: PodManager, locator: Locator) -> None:
        self._manager = manager
        self._locator = locator
        self._stirred = trio.Event()
        self._poll_s = POLL_S
        self._pause_s = RETRY_FIRST_S
        self._complaint = ""

    async def run(self) -> None:
        """Follow them until cancelled."""
        while True:
            while not self._manager.named():  # noqa: ASYNC110 (a pod may come from anywhere)
                await trio.sleep(POLL_S)
            try:
                async with self._locator.session() as session:
                    await self._follow(session)
            except (MeshbpfError, BaseExceptionGroup) as error:
                known = only_known(error)
                if known is None:
                    raise
                self._complain(known)
                await trio.sleep(self._pause_s * random.uniform(0.8, 1.2))  # noqa: S311
                self._pause_s = min(self._pause_s * 2, RETRY_MOST_S)

    async def _follow(self, session: CriSession) -> None:
        """Compare again and again while the connection lasts and somebody is to be followed."""
        async with trio.open_nursery() as nursery:
            self._poll_s = POLL_S
            nursery.start_soon(self._listen, session)
            while self._manager.named():
                self._stirred = trio.Event()
                await self._compare(session)
                self._answered()
                with trio.move_on_after(self._poll_s):
                    await self._stirred.wait()
                    await trio.sleep(SETTLE_S)
            nursery.cancel_scope.cancel()

    async def _listen(self, session: CriSession) -> None:
        try:
            async with session.events() as events:
                async for _ in events:
                    self._poll_s = POLL_WITH_EVENTS_S
                    self._stirred.set()
        except GrpcError as error:
            if error.status is not Status.UNIMPLEMENTED:
                log.debug("no events from the container runtime", reason=error.what)
        # The stream ended, or there is none: looking at a pace is enough.
        self._poll_s = POLL_S

    async def _compare(self, session: CriSession) -> None:
        ready = await session.ready_pods()
        for key, sandbox in self._manager.named().items():
            now = ready.get(key, "")
            if now == sandbox:
                continue
            if not now:
                await self._manager.lost(key, sandbox)
                continue
            try:
                where = await trio.to_thread.run_sync(of_sandbox, await session.status(now))
            except MeshbpfError as error:
                if error.code in _RUNTIME_FAULTS:
                    raise
                # It died while we looked, or took the host's network.
                log.warning("pod cannot be attached again", pod=key, reason=error.what)
                await self._manager.lost(key, sandbox)
                continue
            await self._manager.found(key, where)

    def _complain(self, error: MeshbpfError) -> None:
        if error.what != self._complaint:
            log.warning(
                "container runtime does not answer: pods attached by name are not followed",
                reason=error.what,
                hint=error.hint,
            )
        self._complaint = error.what

    def _answered(self) -> None:
        if self._complaint:
            log.info("container runtime answers again")
        self._complaint = ""
        self._pause_s = RETRY_FIRST_S


_RUNTIME_FAULTS = frozenset({"cri-failed", "no-cri", "bad-answer"})
