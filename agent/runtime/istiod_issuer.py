"""Certificates from istiod, which signs for the pods of the node that our token is bound to.

A waypoint asks for its own certificate alone, by the token of its own account.

One connection serves all requests. It is opened anew when it breaks and when
the file of roots that istiod is checked by changes; that change is also how a
node learns that the mesh's root is being rotated, so certificates are renewed
then.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import trio

from meshbpf.agent.core.ca import new_key
from meshbpf.agent.core.csr import check_answer, check_roots, signing_request
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.runtime.control_plane import SYSTEM_ROOTS, ControlPlane
from meshbpf.agent.runtime.file_signature import Signature, signature_of
from meshbpf.agent.runtime.grpc_client import Channel
from meshbpf.agent.runtime.issuing import Issued
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.wire import istio_ca
from meshbpf.agent.wire.grpc import GrpcError, Status

REQUEST_TIMEOUT_S = 10.0
WATCH_S = 2.0
"""How often the file of roots is looked at; ztunnel waits as long for it to settle."""

log = Log("ca")


class IstiodIssuer:
    """An `Issuer` over istiod's CreateCertificate."""

    remote = True

    def __init__(
        self,
        plane: ControlPlane,
        now: Callable[[], datetime],
        *,
        impersonates: bool = True,
        watch_s: float = WATCH_S,
    ) -> None:
        self._impersonates = impersonates
        self._plane = plane
        self._now = now
        self._watch_s = watch_s
        self._nursery: trio.Nursery | None = None
        self._running = trio.Event()
        self._opening = trio.Lock()
        self._channel: Channel | None = None
        self._retired = trio.Event()
        self._roots_pem = b""

    @property
    def roots_pem(self) -> bytes:
        """As the newest answer had it."""
        return self._roots_pem

    async def run(self, renew_all: Callable[[], None]) -> None:
        """Keep the connection and watch the roots, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            self._running.set()
            seen = self._signature()
            while True:
                await trio.sleep(self._watch_s)
                found = self._signature()
                if found is not None and found != seen:
                    seen = found
                    log.info("roots of the control plane have changed", file=self._plane.root)
                    self._retire()
                    renew_all()

    def warnings(self) -> tuple[str, ...]:
        """There are none: what istiod refuses is told by identity."""
        return ()

    async def issue(self, identity: SpiffeId, not_before: datetime, not_after: datetime) -> Issued:
        """Ask istiod; it decides over the beginning and may grant less time."""
        key = new_key()
        request = istio_ca.encode(
            identity,
            signing_request(identity, key),
            round((not_after - self._now()).total_seconds()),
            impersonated=self._impersonates,
        )
        channel = await self._connected()
        try:
            answer = await channel.unary(
                istio_ca.METHOD,
                request,
                timeout_s=REQUEST_TIMEOUT_S,
                metadata=await self._plane.metadata(),
            )
        except GrpcError as error:
            hint = _hint(error, self._impersonates)
            raise MeshbpfError("ca-refused", f"{identity}: {error.what}", hint) from error
        found = istio_ca.decode(identity, answer)
        check_answer(identity, key, found.chain_pem, self._now())
        check_roots(identity, found.roots_pem)
        self._roots_pem = found.roots_pem
        return Issued(found.chain_pem, key, found.roots_pem)

    async def _connected(self) -> Channel:
        await self._running.wait()
        async with self._opening:
            if self._channel is None or self._channel.broken:
                self._retire()
                assert self._nursery is not None  # noqa: S101 (running)
                self._channel = await self._nursery.start(self._hold, self._retired)
            return self._channel

    async def _hold(
        self,
        retired: trio.Event,
        task_status: trio.TaskStatus[Channel] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        async with self._plane.channel() as channel:
            task_status.started(channel)
            await retired.wait()
            # Requests under way may finish on it.
            await trio.sleep(REQUEST_TIMEOUT_S)

    def _retire(self) -> None:
        self._retired.set()
        self._retired = trio.Event()
        self._channel = None

    def _signature(self) -> Signature | None:
        if self._plane.root == SYSTEM_ROOTS:
            return None
        return signature_of(Path(self._plane.root))  # None while a projected volume is replaced


def _hint(error: GrpcError, impersonates: bool) -> str:
    if error.status in (Status.UNAUTHENTICATED, Status.PERMISSION_DENIED):
        if not impersonates:
            return "the token must be of this very account, for the audience istio-ca"
        return (
            "the token must be bound to the agent's own Pod on this node, for the audience "
            "istio-ca, and its account be one of istiod's CA_TRUSTED_NODE_ACCOUNTS"
        )
    return "istiod's log says more"
