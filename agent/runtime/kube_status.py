"""Tells the cluster which pods this node's agent steers.

The annotation is Istio's (`ambient.istio.io/redirection: enabled`): other
nodes send HBONE to a pod that has it, and plaintext to one that has not. So
it is set only once the pod is steered, and taken away when it is not any
more. A pod that cannot be told of is told of again at the next look.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import trio

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.kube_names import CORE, REDIRECTION, REDIRECTION_ENABLED
from meshbpf.agent.core.objects import KubeObject
from meshbpf.agent.runtime.kube_api import KubeError
from meshbpf.agent.runtime.kubernetes import KubernetesSource
from meshbpf.agent.runtime.logs import Log

PACE_S = 1.0

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

    async def run(self) -> None:
        """Compare again and again until cancelled."""
        while True:
            await self.look()
            await trio.sleep(PACE_S)

    async def look(self) -> None:
        """One comparison of what is steered with what the cluster says."""
        steered = self._steered()
        objects = self._source.objects
        for pod in objects.of_kind(CORE, "Pod") if objects is not None else ():
            if pod.spec.get("nodeName") != self._node:
                continue
            told = pod.annotations.get(REDIRECTION) == REDIRECTION_ENABLED
            wanted = f"{pod.namespace}/{pod.name}" in steered
            if told != wanted:
                await self._tell(pod, wanted)

    async def _tell(self, pod: KubeObject, steered: bool) -> None:
        value = REDIRECTION_ENABLED if steered else None
        change = {"metadata": {"annotations": {REDIRECTION: value}}}
        key = f"{pod.namespace}/{pod.name}"
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
            log.info("the cluster was told of a pod", pod=key, steered=steered)
