"""Who of several replicas works: the holder of a Lease (coordination.k8s.io/v1).

As client-go's leaderelection has it: a lease that its holder has not renewed
for its duration may be taken, by our own clock from when we saw its last
change, since clocks of machines differ. A holder that cannot renew for
RENEW_DEADLINE_S stops before another one may begin.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

import msgspec
import trio

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.runtime.kube_api import KubeApi, KubeError
from meshbpf.agent.runtime.logs import Log

# client-go's defaults.
DURATION_S = 15
RENEW_DEADLINE_S = 10.0
RETRY_S = 2.0

log = Log("lease")


class _Spec(msgspec.Struct, omit_defaults=True):
    holder: str = msgspec.field(name="holderIdentity", default="")
    duration_s: int = msgspec.field(name="leaseDurationSeconds", default=0)
    acquired: str = msgspec.field(name="acquireTime", default="")
    renewed: str = msgspec.field(name="renewTime", default="")
    transitions: int = msgspec.field(name="leaseTransitions", default=0)


class _Lease(msgspec.Struct):
    metadata: dict[str, Any]
    spec: _Spec = msgspec.field(default_factory=_Spec)


class Leadership:
    """One replica's part in the election. `identity` must be its own."""

    def __init__(
        self,
        api: KubeApi,
        namespace: str,
        name: str,
        identity: str,
        now: Callable[[], datetime],
    ) -> None:
        self._api = api
        self._collection = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._name = name
        self._identity = identity
        self._now = now
        self._seen: _Lease | None = None
        self._seen_at = 0.0
        self.leads = False

    async def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do `work` whenever this replica leads; it is cancelled when that ends. For ever.

        At our own end the lease is given back, so that another one need not wait.
        """
        while True:
            await self._acquire()
            log.info("leading", identity=self._identity)
            self.leads = True
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(work)
                    await self._keep()
                    nursery.cancel_scope.cancel()
            finally:
                self.leads = False
                with trio.move_on_after(RETRY_S, shield=True):
                    await self._give_back()
            log.warning("not leading any more", identity=self._identity)

    async def _acquire(self) -> None:
        complaint = ""
        while True:
            try:
                if await self._try():
                    return
                complaint = ""
            except MeshbpfError as error:
                if error.what != complaint:
                    log.warning("no lease", cause=error)
                complaint = error.what
            await trio.sleep(RETRY_S)

    async def _keep(self) -> None:
        """Renew it; returns when that has failed for too long, or somebody else has it."""
        renewed_at = trio.current_time()
        while True:
            await trio.sleep(RETRY_S)
            # A request that hangs must not outlive the deadline.
            with trio.move_on_at(renewed_at + RENEW_DEADLINE_S):
                try:
                    if not await self._try():
                        return
                except MeshbpfError as error:
                    log.warning("lease not renewed", cause=error)
                else:
                    renewed_at = trio.current_time()
            if trio.current_time() >= renewed_at + RENEW_DEADLINE_S:
                return

    async def _try(self) -> bool:
        """Take or renew it, if it is free or ours. Raises MeshbpfError."""
        try:
            lease = msgspec.json.decode(await self._api.get(self._path), type=_Lease)
        except KubeError as error:
            if error.status != 404:
                raise
            return await self._make()
        except msgspec.DecodeError as error:
            raise KubeError("bad-answer", f"{self._path}: {error}") from error
        if self._seen is None or lease.spec != self._seen.spec:
            self._seen, self._seen_at = lease, trio.current_time()
        ours = lease.spec.holder == self._identity
        expired = trio.current_time() >= self._seen_at + (lease.spec.duration_s or DURATION_S)
        if lease.spec.holder and not ours and not expired:
            return False
        spec = self._spec(lease.spec, ours=ours)
        return await self._put(_Lease(lease.metadata, spec))

    async def _make(self) -> bool:
        lease = _Lease({"name": self._name}, self._spec(_Spec(), ours=False))
        try:
            await self._api.create(self._collection, _body(lease))
        except KubeError as error:
            if error.status == 409:  # another replica was faster
                return False
            raise
        return True

    async def _put(self, lease: _Lease) -> bool:
        try:
            await self._api.replace(self._path, _body(lease))
        except KubeError as error:
            if error.status == 409:
                return False
            raise
        return True

    async def _give_back(self) -> None:
        try:
            lease = msgspec.json.decode(await self._api.get(self._path), type=_Lease)
            if lease.spec.holder == self._identity:
                free = _Spec("", 1, self._time(), self._time(), lease.spec.transitions)
                await self._put(_Lease(lease.metadata, free))
        except (MeshbpfError, msgspec.DecodeError) as error:
            log.info("lease not given back: it will run out", cause=error)

    def _spec(self, before: _Spec, *, ours: bool) -> _Spec:
        time = self._time()
        if ours:
            return _Spec(self._identity, DURATION_S, before.acquired, time, before.transitions)
        return _Spec(self._identity, DURATION_S, time, time, before.transitions + 1)

    def _time(self) -> str:
        """As metav1.MicroTime."""
        return self._now().strftime("%Y-%m-%dT%H:%M:%S.%fZ")

    @property
    def _path(self) -> str:
        return f"{self._collection}/{self._name}"


def _body(lease: _Lease) -> dict[str, Any]:
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": lease.metadata,
        "spec": msgspec.to_builtins(lease.spec),
    }
