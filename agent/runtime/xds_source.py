"""Mesh state from istiod: one delta stream, kept up for as long as the agent runs.

While istiod cannot be reached, the state that it gave stays in force, as with
ztunnel: an outage of the control plane must not become one of the data plane.
`status` says how long it lasts.
"""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime

import trio

from meshbpf.agent.api import StateKind
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.objects import KubeObject, ObjectSet
from meshbpf.agent.core.xds import ADDRESS, AUTHORIZATION, Backoff, DeltaMachine, Ending, Push
from meshbpf.agent.runtime import heap
from meshbpf.agent.runtime.certs import utc_now
from meshbpf.agent.runtime.control_plane import ControlPlane, UnreachableError
from meshbpf.agent.runtime.exposition import Family, Kind, labelled
from meshbpf.agent.runtime.grpc_client import Call
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.runtime.mesh_source import MeshWriter, SourceStatistics
from meshbpf.agent.wire import xds
from meshbpf.agent.wire.grpc import GrpcError, Status
from meshbpf.agent.wire.pb.discovery_pb2 import Node
from meshbpf.agent.wire.xds_delta import ReadPush, read_push
from meshbpf.agent.wire.xds_records import RecordReader

# With these a server means "come again": istiod ends streams by age, and restarts.
_COME_AGAIN = frozenset(
    {Status.UNKNOWN, Status.CANCELLED, Status.DEADLINE_EXCEEDED, Status.UNAVAILABLE}
)

POLICY_WAIT_S = 1.0
"""istiod sends policies within milliseconds after the workloads that list them."""
SMALL_BYTES = 4096
"""Some ten workloads or policies: read in a fraction of a millisecond."""
_SHOWN = 5
"""Refused resources that `status` shows by name."""

log = Log("xds")


@dataclass(frozen=True, slots=True)
class XdsStatistics(SourceStatistics):
    """`loads` are pushes that took effect, `refused` resources that did not."""

    connected: int
    """1 while a stream stands."""


class XdsSource:
    """One control plane's delta stream, as a `MeshSource`."""

    def __init__(
        self,
        plane: ControlPlane,
        node: Node,
        *,
        now: Callable[[], datetime] = utc_now,
        rng: random.Random | None = None,
    ) -> None:
        self._plane = plane
        self._node = node
        self._now = now
        self._rng = rng or random.Random()  # noqa: S311 (jitter, no secret)
        self._machine = DeltaMachine()
        self._reader = RecordReader()
        self._connected = False
        self._loads = self._refused = 0
        self.loaded_at: datetime | None = None
        """When the newest push took effect."""
        self._outage: MeshbpfError | None = None
        self.terminations: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()
        """Received, by type."""
        self.message_bytes: Counter[str] = Counter()

    @property
    def error(self) -> MeshbpfError | None:
        """Why there is no stream, or which resources are not in force as they were sent."""
        refused = self._machine.refused
        if self._outage is not None or not refused:
            return self._outage
        shown = [f"{name}: {why}" if name else why for name, why in refused.items()]
        return MeshbpfError(
            "bad-push",
            f"{len(refused)} resources refused: {'; '.join(shown[:_SHOWN])}",
            "all others are in force; istiod's log has the whole text",
        )

    @property
    def kind(self) -> StateKind:
        """It is a control plane's."""
        return "xds"

    @property
    def origin(self) -> str:
        """Its address."""
        return f"https://{self._plane.authority}"

    @property
    def healthy(self) -> bool:
        """Some state is in force. That istiod is away makes it no less true (see above)."""
        return self._machine.ready

    @property
    def objects(self) -> ObjectSet | None:
        """Istiod sends records, not objects."""
        return None

    async def find_pod(self, _namespace: str, _name: str) -> KubeObject | None:
        """Istiod sends records, not objects."""
        await trio.lowlevel.checkpoint()
        return None

    def warnings(self) -> tuple[str, ...]:
        """Nothing beyond `error`: what is refused is refused by name there."""
        return ()

    def load(self) -> None:
        """The first state comes from `watch`."""
        return

    def families(self) -> Iterator[Family]:
        """Ztunnel's three metrics of it."""
        for name, told, label, counts in (
            (
                "istio_xds_connection_terminations",
                "The total number of completed connections to xds server (unstable)",
                "reason",
                self.terminations,
            ),
            (
                "istio_xds_message",
                "Total number of messages received (unstable)",
                "url",
                self.messages,
            ),
            (
                "istio_xds_message_bytes",
                "Total number of bytes received (unstable)",
                "url",
                self.message_bytes,
            ),
        ):
            yield labelled(name, told, Kind.COUNTER, label, counts)

    def statistics(self) -> XdsStatistics:
        """Counters since the start."""
        return XdsStatistics(self._loads, self._refused, int(self._connected))

    async def watch(
        self, mesh: MeshWriter, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Stream after stream, until cancelled; started when each type has arrived once."""
        backoff = Backoff(self._rng)
        began = False

        def progressed() -> None:
            nonlocal began
            if self._machine.ready and not began:
                began = True
                task_status.started()

        while True:
            before = self._loads
            ending, error = await self._stream(mesh, progressed)
            self._connected = False
            self.terminations[ending.value] += 1
            self._outage = error
            pause_s = backoff.after(ending, useful=self._loads > before)
            told = log.debug if ending in (Ending.COMPLETE, Ending.RECONNECT) else log.warning
            told(
                "stream ended",
                reason=ending.value,
                cause="" if error is None else error.what,
                retry_s=round(pause_s, 3),
            )
            await trio.sleep(pause_s)

    async def _stream(
        self, mesh: MeshWriter, progressed: Callable[[], None]
    ) -> tuple[Ending, MeshbpfError | None]:
        received = self.messages.total()
        try:
            async with self._plane.channel() as channel:
                metadata = await self._plane.metadata()
                async with channel.call(xds.METHOD, metadata=metadata) as call:
                    for request in self._machine.opening():
                        await call.send(xds.encode(request, self._node))
                    await self._follow(call, mesh, progressed)
                return Ending.COMPLETE, None
        except UnreachableError as error:
            return Ending.CONNECTION_ERROR, error
        except GrpcError as error:
            if self.messages.total() == received:
                return Ending.CONNECTION_ERROR, error
            if error.status in _COME_AGAIN:
                return Ending.RECONNECT, error
            return Ending.ERROR, error
        except MeshbpfError as error:
            return Ending.ERROR, error

    async def _follow(self, call: Call, mesh: MeshWriter, progressed: Callable[[], None]) -> None:
        """Take pushes as they come, but for workloads that run ahead of their policies.

        istiod sends workloads first. Those that list a policy which is not here
        yet would be closed to everybody until it is, and live connections that
        the policy allows would be cut for nothing: they wait for it a little.
        """
        early: deque[tuple[Push, ReadPush]] = deque()
        while True:
            message: bytes | None = b""
            with trio.move_on_after(POLICY_WAIT_S if early else math.inf) as patience:
                message = await call.receive()
            self._connected, self._outage = True, None
            if message is None:
                return
            if not patience.cancelled_caught:
                push, read = await self._receive(message)
                if push.type_url == ADDRESS and (early or self._lacks_policies(read)):
                    early.append((push, read))
                else:
                    await self._take(call, push, read, mesh)
            # In their order: a workload may be in several.
            while early and (patience.cancelled_caught or not self._lacks_policies(early[0][1])):
                await self._take(call, *early.popleft(), mesh)
            progressed()

    def _lacks_policies(self, read: ReadPush) -> bool:
        holds = self._machine.holds
        return any(
            not holds(AUTHORIZATION, name)
            for one in read.delta.workloads
            for name in one.authorization_policies
        )

    async def _receive(self, message: bytes) -> tuple[Push, ReadPush]:
        # A thread that computes keeps the event loop from the interpreter for up to 5 ms at
        # a time (sys.getswitchinterval): what takes less than that is better done here.
        if len(message) <= SMALL_BYTES:
            push, read = self._decode(message)
        else:
            push, read = await trio.to_thread.run_sync(self._decode, message)
        self.messages[push.type_url] += 1
        self.message_bytes[push.type_url] += len(message)
        return push, read

    def _decode(self, message: bytes) -> tuple[Push, ReadPush]:
        push = xds.decode(message)
        return push, read_push(push, self._reader, heap.grown)

    async def _take(self, call: Call, push: Push, read: ReadPush, mesh: MeshWriter) -> None:
        """Put one push into force and answer it."""
        refused = read.refused
        try:
            await mesh.apply_delta(read.delta)
        except MeshbpfError as error:
            refused = {"": error.what}
        else:
            self._loads += 1
            self.loaded_at = self._now()
        answer = self._machine.answer(push, refused, read.kept)
        self._note(push, len(refused))
        await call.send(xds.encode(answer, None))

    def _note(self, push: Push, refused: int) -> None:
        self._refused += refused
        fields = {
            "type": push.type_url.rpartition(".")[2],
            "resources": len(push.resources),
            "removed": len(push.removed),
        }
        if refused:
            log.error("resources of a push refused", cause=self.error, **fields)
        else:
            log.debug("push in force", **fields)
