"""Brings the attached pods in line with what the labels ask for: start-up, and repair.

CNI attaches pods that start while the agent runs. Those that were there
before, that came up while it was down, or whose labels changed are found
here: looked for at every change of the mesh state and at a gentle pace, by
name in the container runtime. What a person attached is left as it is.
"""

from __future__ import annotations

import trio

from meshbpf.agent.api import AttachRequest
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.runtime.locate import Locator
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.runtime.membership import Member, Membership
from meshbpf.agent.runtime.mesh_source import MeshSource
from meshbpf.agent.runtime.pods import PodManager

PACE_S = 10.0
SETTLE_S = 0.2
"""A change of the mesh rarely comes alone: one look for several."""

log = Log("enrol")


class Reconciler:
    """The watch over the pods of this node that ought to be attached."""

    def __init__(
        self, membership: Membership, manager: PodManager, locator: Locator, source: MeshSource
    ) -> None:
        self._membership = membership
        self._manager = manager
        self._locator = locator
        self._source = source
        self._stirred = trio.Event()
        self._complaints: dict[str, str] = {}

    def stir(self, _mesh: Snapshot) -> None:
        """The mesh state changed: look soon."""
        self._stirred.set()

    async def run(self) -> None:
        """Look again and again until cancelled."""
        while True:
            self._stirred = trio.Event()
            if self._source.healthy:  # what a source that is ill does not say is no answer
                await self._look()
            with trio.move_on_after(PACE_S):
                await self._stirred.wait()
                await trio.sleep(SETTLE_S)

    async def _look(self) -> None:
        wanted = {str(member.name): member for member in self._membership.here()}
        there = {pod.key for pod in self._manager.list()}
        for key in wanted.keys() - there:
            await self._enrol(wanted[key])
        self._complaints = {k: why for k, why in self._complaints.items() if k in wanted}
        known = await self._no_longer(frozenset(wanted))
        if known:
            await self._manager.release(lambda one: one.pod in known)

    async def _no_longer(self, wanted: frozenset[str]) -> frozenset[str]:
        """Pods that were enrolled, still are there, and do not ask for it any more."""
        found = set()
        for pod in self._manager.list():
            if not pod.attachment.enrolled or pod.key in wanted:
                continue
            try:
                if await self._membership.of(pod.attachment.name) is None:
                    found.add(pod.key)
            except MeshbpfError:
                continue  # nobody knows: what is there stays
        return frozenset(found)

    async def _enrol(self, member: Member) -> None:
        request = AttachRequest(pod=str(member.name), service_account=member.account)
        try:
            await self._manager.enrol(request, await self._locator.locate(request))
        except MeshbpfError as error:
            # A pod that is just being made is no pod of the runtime's yet: CNI has it.
            if self._complaints.get(request.pod) != error.what and error.code != "unknown-pod":
                log.warning("pod is not enrolled", pod=request.pod, cause=error)
            self._complaints[request.pod] = error.what
        else:
            self._complaints.pop(request.pod, None)
            log.info("pod enrolled", pod=request.pod)
