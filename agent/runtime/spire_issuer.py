"""Certificates from the SPIRE agent of this node, by its Delegated Identity API.

The SPIRE agent makes keys, has certificates signed, renews them and pushes
each at once; nothing is asked for twice. One connection to its admin socket
carries a subscription for each identity and one for the roots. What a
subscription has brought stays in force when it ends; it is opened anew with
growing pauses.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path

import trio

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.runtime.grpc_client import Call, Channel
from meshbpf.agent.runtime.issuing import Holder, Issued
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.wire import spire
from meshbpf.agent.wire.grpc import GrpcError, Status
from meshbpf.agent.wire.spire import SpireError

FIRST_ANSWER_S = 10.0
"""An agent answers a subscription at once, but for SVIDs that its server has yet to sign."""
RETRY_FIRST_S = 0.25
RETRY_LAST_S = 15.0
RETRY_JITTER = 0.2
_MAX_MESSAGE_BYTES = 4 * 1024 * 1024  # gRPC's own default for what a client takes

log = Log("ca")


class SpireIssuer:
    """A `PushingIssuer` over one admin socket, for identities of one trust domain."""

    remote = True

    def __init__(
        self,
        socket: Path,
        trust_domain: str,
        now: Callable[[], datetime],
        rng: random.Random | None = None,
    ) -> None:
        self._socket = socket
        self._trust_domain = trust_domain
        self._now = now
        self._rng = rng or random.Random()  # noqa: S311 (jitter, no secret)
        self._nursery: trio.Nursery | None = None
        self._running = trio.Event()
        self._opening = trio.Lock()
        self._channel: Channel | None = None
        self._roots_pem = b""
        self._roots_tried = trio.Event()
        """Set with each answer about roots, good or bad, then replaced."""
        self._opened = trio.Event()
        """Set when a connection is made, then replaced: who pauses goes on at once."""
        self._error: MeshbpfError | None = None

    @property
    def roots_pem(self) -> bytes:
        """As the newest push had them."""
        return self._roots_pem

    def warnings(self) -> tuple[str, ...]:
        """Why the roots are not followed at the moment."""
        return (self._error.what,) if self._error is not None else ()

    async def run(self, renew_all: Callable[[], None]) -> None:
        """Keep the connection and follow the roots, until cancelled."""

        async def take(data: bytes) -> None:
            await trio.lowlevel.checkpoint()
            try:
                roots_pem = spire.roots(self._trust_domain, data)
            except SpireError as error:
                failed(error, None)
                return
            changed, self._roots_pem = roots_pem != self._roots_pem, roots_pem
            self._tried(None)
            if changed:
                renew_all()

        def failed(error: MeshbpfError, retry_s: float | None) -> None:
            self._tried(error)
            log.error("roots not followed", cause=error, **_retry(retry_s))

        async with trio.open_nursery() as self._nursery:
            self._running.set()
            await self._subscribe(spire.BUNDLES, spire.bundles_request(), take, failed)

    async def follow(self, identity: SpiffeId, holder: Holder) -> None:
        """Hand each certificate of `identity` to `holder`, until cancelled."""

        async def take(data: bytes) -> None:
            try:
                chain_pem, key = spire.svid(identity, data, self._now())
            except MeshbpfError as error:
                # The subscription stands: what is wrong is mended by another push.
                holder.failed(error, None)
                return
            holder.put(Issued(chain_pem, key, await self._roots()))

        if identity.trust_domain != self._trust_domain:
            holder.failed(_foreign(identity, self._trust_domain), None)
            await trio.sleep_forever()
        await self._subscribe(spire.SVIDS, spire.svids_request(identity), take, holder.failed)

    async def _subscribe(
        self,
        method: str,
        request: bytes,
        take: Callable[[bytes], Awaitable[None]],
        failed: Callable[[MeshbpfError, float | None], None],
    ) -> None:
        """Give every message to `take`; begin anew when the call ends or `take` raises."""
        failures = 0
        while True:
            opened = self._opened
            try:
                channel = await self._connected()
                opened = self._opened
                async with channel.call(method) as call:
                    await call.send(request, end=True)
                    data = await _first(call)
                    while data is not None:
                        await take(data)
                        failures = 0
                        data = await call.receive()
                raise SpireError("subscription-ended", f"the SPIRE agent ended {method}")
            except MeshbpfError as error:
                failures += 1
                pause_s = self._pause_s(failures)
                failed(self._explained(error), pause_s)
            with trio.move_on_after(pause_s):
                await opened.wait()

    async def _connected(self) -> Channel:
        await self._running.wait()
        async with self._opening:
            if self._channel is None or self._channel.broken:
                assert self._nursery is not None  # noqa: S101 (running)
                try:
                    stream = await trio.open_unix_socket(str(self._socket))
                except OSError as error:
                    raise SpireError(
                        "spire-unreachable",
                        f"cannot connect to the SPIRE agent at {self._socket}: {error}",
                        "check that spire-agent runs, and that this is its admin_socket_path",
                    ) from error
                # Go's servers refuse an :authority with slashes in it. No keepalive:
                # they take PINGs more often than every five minutes for abuse, and a
                # unix socket tells by itself when its other end is gone.
                channel = Channel(stream, "localhost", max_message_bytes=_MAX_MESSAGE_BYTES)
                await self._nursery.start(channel.run)
                self._channel = channel
                self._error = None
                self._opened.set()
                self._opened = trio.Event()
            return self._channel

    async def _roots(self) -> bytes:
        """Those in force; waits for the first. Raises MeshbpfError when there are none."""
        if not self._roots_pem and self._error is None:
            with trio.move_on_after(FIRST_ANSWER_S):
                await self._roots_tried.wait()
        if not self._roots_pem:
            raise self._error or SpireError("no-bundle", "the SPIRE agent has sent no roots yet")
        return self._roots_pem

    def _tried(self, error: MeshbpfError | None) -> None:
        self._error = error
        self._roots_tried.set()
        self._roots_tried = trio.Event()

    def _pause_s(self, failures: int) -> float:
        pause_s = min(RETRY_LAST_S, RETRY_FIRST_S * 2.0 ** min(failures - 1, 16))
        return pause_s * (1 + self._rng.uniform(-RETRY_JITTER, RETRY_JITTER))

    def _explained(self, error: MeshbpfError) -> MeshbpfError:
        if not isinstance(error, GrpcError):
            return error
        return SpireError("spire-refused", f"{self._socket}: {error.what}", _hint(error.status))


async def _first(call: Call) -> bytes | None:
    with trio.move_on_after(FIRST_ANSWER_S):
        return await call.receive()
    raise SpireError(
        "no-svid-yet",
        f"the SPIRE agent did not answer {call.method} in {FIRST_ANSWER_S:g} s",
        "it answers once its server has signed: spire-agent's log says why that takes so long",
    )


def _retry(retry_s: float | None) -> dict[str, float]:
    """What the log says of it; nothing where the next push is waited for."""
    return {} if retry_s is None else {"retry_s": round(retry_s, 2)}


def _foreign(identity: SpiffeId, trust_domain: str) -> SpireError:
    return SpireError(
        "foreign-trust-domain",
        f"{identity} is not of trust domain {trust_domain}, the one that SPIRE is asked for",
        "give `meshbpf run --trust-domain` the trust domain of the SPIRE server and of the mesh",
    )


def _hint(status: Status) -> str:
    match status:
        case Status.PERMISSION_DENIED:
            return (
                "the meshbpf agent needs an entry of its own (`spire-server entry create`, by "
                "unix:uid:0 or its Pod's selectors), and the SPIFFE id of that entry must be in "
                "authorized_delegates of the SPIRE agent's configuration"
            )
        case Status.UNIMPLEMENTED:
            return "this may be the Workload API's socket: name the agent's admin_socket_path"
        case _:
            return "spire-agent's log says more"
