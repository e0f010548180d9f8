"""One round of the controller: what Gateways ask for, and what became of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any

import trio

from meshbpf.agent.core.address import AddressError, IPAddress, parse_ip
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.kube_names import CORE, GATEWAY_NAME
from meshbpf.agent.core.objects import KubeObject, ObjectSet
from meshbpf.agent.core.state import MeshDelta, MeshState
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.store_delta import delta_to
from meshbpf.agent.l7.deployment import Template, gateway_class, objects_of
from meshbpf.agent.l7.oversight import GatewayName, Overseer, gateways_of, name_of, statuses
from meshbpf.agent.l7.status import Deployed
from meshbpf.agent.runtime.controller.desired import Desired
from meshbpf.agent.runtime.logs import Log

RETRY_S = 5.0
"""After something could not be applied; a change comes first."""

log = Log("controller")


class Reconciler:
    """Where the source writes, and who acts on it while `run` runs."""

    def __init__(
        self,
        template: Template,
        desired: Desired,
        objects: Callable[[], ObjectSet],
        now: Callable[[], datetime],
        *,
        role: str = "",
    ) -> None:
        """`role` names the ClusterRole of waypoints, and its binding; empty: others bind it."""
        self._template = template
        self._desired = desired
        self._objects = objects
        self._now = now
        self._role = role
        self._overseer = Overseer(template)
        self._stirred = trio.Event()
        self._complaints: dict[GatewayName, str] = {}
        self.mesh = Snapshot.EMPTY

    async def apply(self, state: MeshState) -> None:
        """Make `state` the whole mesh."""
        self._take(await trio.to_thread.run_sync(delta_to, self.mesh, state))

    async def apply_delta(self, delta: MeshDelta) -> None:
        """Change the mesh by `delta`, whole."""
        self._take(delta)

    def _take(self, delta: MeshDelta) -> None:
        self.mesh = self.mesh.after(delta, self.mesh.version + 1)
        self._stirred.set()

    async def run(self) -> None:
        """Round after round, until cancelled."""
        while True:
            self._stirred = trio.Event()
            failed = await self._round(self._objects(), self.mesh)
            with trio.move_on_after(RETRY_S if failed else float("inf")):
                await self._stirred.wait()

    async def _round(self, objects: ObjectSet, mesh: Snapshot) -> bool:
        """Whether something could not be done."""
        gateways = list(gateways_of(objects))
        bodies = {name_of(each): objects_of(each, self._template) for each in gateways}
        common = [gateway_class(), *self._binding(gateways)]
        self._desired.forget([*common, *(body for found in bodies.values() for body in found)])
        failed = await self._apply(objects, common, ("", "")) != ""
        deployed: dict[GatewayName, Deployed] = {}
        for gateway in gateways:
            name = name_of(gateway)
            failure = await self._apply(objects, bodies[name], name)
            failed = failed or failure != ""
            deployed[name] = self._deployed(objects, gateway, failure)
        oversight = await trio.to_thread.run_sync(self._overseer.look, objects, mesh)
        time = self._now().strftime("%Y-%m-%dT%H:%M:%SZ")
        namespace = self._template.root_namespace
        for about, status in statuses(objects, oversight, deployed, namespace, time):
            await self._desired.write_status(about, status)
        return failed

    async def _apply(
        self,
        objects: ObjectSet,
        wanted: Sequence[dict[str, Any]],
        name: GatewayName,
    ) -> str:
        """Why it could not be done; empty when it could. Told once."""
        try:
            await self._desired.apply(objects, wanted)
        except MeshbpfError as error:
            if self._complaints.get(name) != error.what:
                log.error("objects not applied", gateway="/".join(name), cause=error)
            self._complaints[name] = error.what
            return error.what
        self._complaints.pop(name, None)
        return ""

    def _binding(self, gateways: list[KubeObject]) -> Iterator[dict[str, Any]]:
        """What lets all waypoints' accounts read what they need."""
        if not self._role:
            return
        yield {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": self._role},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "ClusterRole",
                "name": self._role,
            },
            "subjects": [
                {"kind": "ServiceAccount", "namespace": each.namespace, "name": each.name}
                for each in sorted(gateways, key=name_of)
            ],
        }

    def _deployed(self, objects: ObjectSet, gateway: KubeObject, failure: str) -> Deployed:
        service = objects.get(CORE, "Service", gateway.namespace, gateway.name)
        pods = (
            each
            for each in objects.of_kind(CORE, "Pod")
            if each.namespace == gateway.namespace and each.labels.get(GATEWAY_NAME) == gateway.name
        )
        return Deployed(
            hostname=self._template.cluster.service_key(*name_of(gateway)).hostname,
            addresses=tuple(_cluster_ips(service)),
            ready=sum(map(_is_ready, pods)),
            failure=failure,
        )


def _cluster_ips(service: KubeObject | None) -> Iterator[IPAddress]:
    spec = service.spec if service is not None else {}
    for text in spec.get("clusterIPs") or [spec.get("clusterIP")]:
        try:
            yield parse_ip(str(text))
        except AddressError:
            continue  # "None", or not given yet


def _is_ready(pod: KubeObject) -> bool:
    if pod.metadata.get("deletionTimestamp"):
        return False
    conditions = (pod.body.get("status") or {}).get("conditions") or ()
    return any(each.get("type") == "Ready" and each.get("status") == "True" for each in conditions)
