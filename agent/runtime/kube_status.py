"""Tells the cluster which pods this node's agent steers.

The annotation is Istio's (`ambient.istio.io/redirection: enabled`): other
nodes send HBONE to a pod that has it, and plaintext to one that has not. So
it is set only once the pod is steered, and taken away when it is not any
more. A pod that cannot be told of is told of again at the next look.

A pod that CNI enrols is told of before its first process runs (`announce`):
by the time that it is ready, and sent connections, everybody knows how.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import trio

from meshbpf.agent.config import PodName
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.kube_names import CORE, REDIRECTION, REDIRECTION_ENABLED
from meshbpf.agent.runtime.kube_api import KubeError
from meshbpf.agent.runtime.kubernetes import KubernetesSource
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.runtime.mesh_source import MeshSource

PACE_S = 1.0
ANNOUNCE_S = 2.0
"""How long the start of a pod may wait for the API server."""
ECHO_S = 2.0
"""What we have told comes back by the watch; until then it is not told again."""

log = Log("kube")


class StatusReporter:
    """Keeps the annotation of this node's pods true."""

    def __init__(
        self, source: KubernetesSource, node: str, steered: Callable[[], Collection[str]]
    ) -> None:
        self._source = source
        self._node = node
        self._steered = steered
        self._complaints: dict[str, str] = {}
        self._told: dict[str, tuple[bool, float]] = {}
        """What each pod was last said to be, and when; for ECHO_S."""

    @classmethod
    def of(
        cls, source: MeshSource, node: str, steered: Callable[[], Collection[str]]
    ) -> StatusReporter | None:
        """None where the source is no cluster's API."""
        return cls(source, node, steered) if isinstance(source, KubernetesSource) else None

    async def announce(self, name: PodName) -> None:
        """Say that the pod is steered, in ANNOUNCE_S at most; if that fails, `run` will."""
        with trio.move_on_after(ANNOUNCE_S) as limit:
            await self._tell(name, steered=True)
        if limit.cancelled_caught:
            log.warning("the API server is slow: pod starts before it is told of", pod=name)

    async def run(self) -> None:
        """Compare again and again until cancelled."""
        while True:
            await self.look()
            await trio.sleep(PACE_S)

    async def look(self) -> None:
        """One comparison of what is steered with what the cluster says."""
        steered = self._steered()
        now = trio.current_time()
        self._told = {key: one for key, one in self._told.items() if now - one[1] < ECHO_S}
        objects = self._source.objects
        for pod in objects.of_kind(CORE, "Pod") if objects is not None else ():
            if pod.spec.get("nodeName") != self._node:
                continue
            told = pod.annotations.get(REDIRECTION) == REDIRECTION_ENABLED
            name = PodName(pod.namespace, pod.name)
            wanted = str(name) in steered
            said = self._told.get(str(name), (told, now))[0]
            if told != wanted and said != wanted:
                await self._tell(name, steered=wanted)

    async def _tell(self, pod: PodName, *, steered: bool) -> None:
        value = REDIRECTION_ENABLED if steered else None
        change = {"metadata": {"annotations": {REDIRECTION: value}}}
        key = str(pod)
        try:
            await self._source.api.patch_status(
                f"/api/v1/namespaces/{pod.namespace}/pods/{pod.name}", change
            )
        except MeshbpfError as error:
            gone = isinstance(error, KubeError) and error.status == 404
            if not gone and self._complaints.get(key) != error.what:
                log.warning("the cluster cannot be told of a pod", pod=key, cause=error)
                self._complaints[key] = error.what
        else:
            self._complaints.pop(key, None)
            self._told[key] = (steered, trio.current_time())
            log.info("the cluster was told of a pod", pod=key, steered=steered)
