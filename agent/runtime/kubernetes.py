"""Mesh state from the Kubernetes API itself, with no control plane between.

The same translation as of a directory of manifests (core/kube_mesh.py), fed
by watches. The first state is put into force once every kind was listed
whole: part of a cluster would be a mesh with holes. From then on what changed
is translated, and goes to the mesh as a change. While the API server
cannot be reached the last state stays, and the source counts as ill once that
has lasted GRACE_S, so that the kernel's lease is not extended for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Literal

import msgspec
import trio

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.kube_cluster import Cluster, Problem
from meshbpf.agent.core.kube_mesh import KINDS
from meshbpf.agent.core.kube_names import CORE
from meshbpf.agent.core.kube_state import ClusterState
from meshbpf.agent.core.objects import KubeObject, ObjectKey, ObjectSet
from meshbpf.agent.core.state import MeshState
from meshbpf.agent.runtime.certs import utc_now
from meshbpf.agent.runtime.kube_api import KubeApi, KubeError
from meshbpf.agent.runtime.kube_watch import Kind, Watcher
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.runtime.mesh_source import MeshWriter, SourceStatistics

SETTLE_S = 0.1
SETTLE_MOST_S = 1.0
"""Changes come in bursts: a state waits for quiet, but not for long."""
GRACE_S = 15.0
TOLD_MOST = 20
_PLURALS = {"EndpointSlice": "endpointslices", "Gateway": "gateways",
            "GatewayClass": "gatewayclasses", "AuthorizationPolicy": "authorizationpolicies",
            "PeerAuthentication": "peerauthentications", "Telemetry": "telemetries",
            "ServiceEntry": "serviceentries", "WorkloadEntry": "workloadentries"}  # fmt: skip

log = Log("state")


class KubernetesSource:
    """One cluster, by its API server."""

    def __init__(
        self,
        api: KubeApi,
        cluster: Cluster,
        *,
        more: Iterable[Kind] = (),
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        """`more` are kinds to follow that the translation does not read, but others do."""
        self._api = api
        self._now = now
        self._cluster = ClusterState(cluster)
        self._stirred = trio.Event()
        self._watchers = [Watcher(api, kind, self._stir) for kind in (*map(followed, KINDS), *more)]
        self._followed = {(each.kind.group, each.kind.kind): each for each in self._watchers}
        self._changed: dict[ObjectKey, None] = {}
        """What the watches have told of, and is not translated yet."""
        self._in_step = False
        """The mesh has the state that the last translation gave."""
        self._problems: tuple[Problem, ...] = ()
        self._loads = self._refused = 0
        self._well_at: float | None = None
        self.objects: ObjectSet | None = ObjectSet.EMPTY
        self.loaded_at: datetime | None = None
        self.error: MeshbpfError | None = None

    @property
    def kind(self) -> Literal["kubernetes"]:
        """What kind of place it is."""
        return "kubernetes"

    @property
    def origin(self) -> str:
        """The API server."""
        return self._api.origin

    @property
    def api(self) -> KubeApi:
        """For who writes to it."""
        return self._api

    @property
    def healthy(self) -> bool:
        """Every kind was listed, and is followed or was a moment ago."""
        if not all(each.synced.is_set() for each in self._watchers):
            return False
        now = time.monotonic()  # asked by the heartbeat's thread, where trio has no clock
        if self._unreachable() is None:
            self._well_at = now
        return self._well_at is not None and now - self._well_at < GRACE_S

    def warnings(self) -> tuple[str, ...]:
        """What is wrong with single objects, and why the server cannot be followed."""
        found = [str(problem) for problem in self._problems]
        if len(found) > TOLD_MOST:
            found[TOLD_MOST:] = [f"and {len(found) - TOLD_MOST} more"]
        down = self._unreachable()
        return (*([down.what] if down is not None else ()), *found)

    def statistics(self) -> SourceStatistics:
        """Counters since the start."""
        return SourceStatistics(self._loads, self._refused)

    def load(self) -> MeshState | None:
        """Nothing before the event loop: the first state takes a conversation."""
        return None

    async def find_pod(self, namespace: str, name: str) -> KubeObject | None:
        """One Pod, asked for where the watch does not have it yet. Raises KubeError."""
        held = self._held(ObjectKey(CORE, "Pod", namespace, name))
        if held is None and self.objects is not None:
            held = self.objects.get(CORE, "Pod", namespace, name)
        if held is not None:
            return held
        try:
            body = await self._api.get(f"/api/v1/namespaces/{namespace}/pods/{name}")
        except KubeError as error:
            if error.status == 404:
                return None
            raise
        try:
            found = msgspec.json.decode(body, type=dict)
        except msgspec.DecodeError as error:
            raise KubeError(
                "bad-answer", f"{self.origin}: pod {namespace}/{name}: {error}"
            ) from error
        return KubeObject(ObjectKey(CORE, "Pod", namespace, name), "v1", found)

    async def watch(
        self, mesh: MeshWriter, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Put each new state into `mesh`, until cancelled; started when the first is in force."""
        async with trio.open_nursery() as nursery:
            for watcher in self._watchers:
                nursery.start_soon(watcher.run)
            for watcher in self._watchers:
                await watcher.synced.wait()
            started = False
            while True:
                self._stirred = trio.Event()
                if await self._put(mesh) and not started:
                    task_status.started()
                    started = True
                await self._stirred.wait()
                await self._settle()

    async def _settle(self) -> None:
        """Wait until nothing changed for SETTLE_S."""
        with trio.move_on_after(SETTLE_MOST_S):
            while True:
                self._stirred = trio.Event()
                with trio.move_on_after(SETTLE_S) as quiet:
                    await self._stirred.wait()
                if quiet.cancelled_caught:
                    return

    async def _put(self, mesh: MeshWriter) -> bool:
        changes = {key: self._held(key) for key in self._changed}
        self._changed = {}
        read_at = self._now()
        standing = await trio.to_thread.run_sync(self._cluster.change, changes)
        # Whoever reads other kinds does it as a part of `apply`.
        self.objects = standing.objects
        # What was refused, or cut off, is offered again with all that came since.
        in_step, self._in_step = self._in_step, False
        try:
            if in_step:
                await mesh.apply_delta(standing.delta)
            else:
                await mesh.apply(standing.translation.state)
        except MeshbpfError as error:
            self._refused += 1
            self.error = error
            log.error("mesh state refused, the last good one stays", cause=error)
            return False
        self._in_step = True
        new = set(standing.problems).difference(self._problems)
        for problem in list(new)[:TOLD_MOST]:
            log.warning("object of the cluster", problem=problem)
        self._problems = standing.problems
        self._loads += 1
        self.loaded_at, self.error = read_at, None
        return True

    def _held(self, key: ObjectKey) -> KubeObject | None:
        """An object as its watch has it now."""
        return self._followed[key.group, key.kind].objects.get(key)

    def _stir(self, changed: Iterable[ObjectKey]) -> None:
        keys = dict.fromkeys(changed)
        if keys:  # a new list may say nothing new
            self._changed.update(keys)
            self._stirred.set()

    def _unreachable(self) -> MeshbpfError | None:
        return next((each.error for each in self._watchers if each.error is not None), None)


def followed(kind: tuple[str, str, str]) -> Kind:
    """All objects of a kind, given as (group, version, kind)."""
    group, version, name = kind
    return Kind(group, version, name, plural(name))


def plural(kind: str) -> str:
    """The name of a kind's list in paths."""
    return _PLURALS.get(kind, f"{kind.lower()}s")
