"""Every connection that the agent carries: who, whither, how much, and an end on demand.

The registry is where policy meets live traffic. An inbound connection is
registered *before* its authorization check, so that a policy which arrives
between the two still finds it: either the check reads the new state, or the
recheck that the new state triggers sees the connection.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

import trio

from meshbpf.agent.core.address import SocketAddress
from meshbpf.agent.core.admission import Admission, admission
from meshbpf.agent.core.authz import ConnectionFacts, Decision
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.service import Service
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.traffic import Described, Labels, Reporter, ResponseFlag, labels
from meshbpf.agent.core.workload import Workload
from meshbpf.agent.l7.telemetry.trace import SpanContext
from meshbpf.agent.runtime.local_pod import LocalPod
from meshbpf.agent.runtime.stream import ByteCount
from meshbpf.agent.runtime.telemetry import Telemetry, flag_of
from meshbpf.agent.wire.errors import RevokedError


class Direction(StrEnum):
    """Which side of the connection is the pod of this node."""

    OUTBOUND = "outbound"
    INBOUND = "inbound"


class Transport(StrEnum):
    """How the connection looks between the nodes."""

    HBONE = "HBONE"
    TCP = "TCP"


class ConnectionState(StrEnum):
    """How far a connection has come."""

    OPENING = "opening"
    OPEN = "open"


@dataclass(frozen=True, slots=True)
class ConnectionRecord:
    """One connection at one moment."""

    id: int
    pod: str
    direction: Direction
    transport: Transport
    state: ConnectionState
    source: SocketAddress
    destination: SocketAddress
    """What the client dialed."""
    upstream: SocketAddress | None
    """What the agent dialed for it: a tunnel's gateway, or an app. None before the dial."""
    source_identity: SpiffeId | None
    destination_identity: SpiffeId | None
    service: str
    """NS/HOSTNAME when a service address was dialed, else empty."""
    opened_at: float
    """Unix time, seconds."""
    age_s: float
    bytes_sent: int
    """From source to destination."""
    bytes_received: int
    """From destination to source."""

    @property
    def peer_identity(self) -> SpiffeId | None:
        """What the far side proved; None for plaintext."""
        inbound = self.direction is Direction.INBOUND
        return self.source_identity if inbound else self.destination_identity


@dataclass(slots=True, eq=False)
class LiveConnection:
    """A connection while it lives. Its owner updates it; the relay adds to its counters."""

    id: int
    pod: LocalPod
    direction: Direction
    transport: Transport
    source: SocketAddress
    destination: SocketAddress
    opened_at: float
    opened_monotonic: float
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    state: ConnectionState = ConnectionState.OPENING
    upstream: SocketAddress | None = None
    target: SocketAddress | None = None
    """Where it ends: the app's address, whatever was dialed to get there."""
    source_identity: SpiffeId | None = None
    destination_identity: SpiffeId | None = None
    source_workload: Workload | None = None
    source_described: Described | None = None
    """What an HBONE client said of itself; used where the mesh knows no workload."""
    destination_workload: Workload | None = None
    destination_described: Described | None = None
    """What an HBONE server on another network said of itself; the mesh knows but its gateway."""
    destination_service: Service | None = None
    """For telemetry: inbound it may be a guess."""
    service: str = ""
    tunnel_address: SocketAddress | None = None
    """The HBONE end of this connection at the destination's side."""
    sent: ByteCount = field(default_factory=ByteCount)
    """From source to destination; the relay counts here."""
    received: ByteCount = field(default_factory=ByteCount)
    facts: ConnectionFacts | None = None
    """What policy judged an inbound connection by; None while nothing was to judge."""
    judged_by: Admission | None = None
    """The rules that admitted it again when a state came in."""
    error: str = ""
    """Why it failed, for the access log; empty while all is well."""
    flag: ResponseFlag = ResponseFlag.NONE
    """The same for metrics."""
    announced: bool = False
    """Telemetry knows of it."""
    announced_labels: Labels | None = None
    """What it was told: its end counts where its beginning did."""
    finished: bool = False
    """Both directions ended in order; anything else is reset."""
    trace: SpanContext | None = None
    """Its span; None where spans are not exported."""
    denied: bool = False
    """Cut by a policy that came after it was admitted."""

    def opened(self, upstream: SocketAddress) -> None:
        """Note that the far leg stands."""
        self.upstream = upstream
        self.state = ConnectionState.OPEN

    @property
    def reporter(self) -> Reporter:
        """Which end of the connection we are."""
        outbound = self.direction is Direction.OUTBOUND
        return Reporter.SOURCE if outbound else Reporter.DESTINATION

    @property
    def mutual_tls(self) -> bool:
        """Whether identities are proven on the way."""
        return self.transport is Transport.HBONE

    def labels(self) -> Labels:
        """The connection in the terms of Istio's metrics; as they were when it was announced."""
        if self.announced_labels is not None:
            return self.announced_labels
        found = labels(
            self.reporter,
            source=self.source_workload,
            described=self.source_described,
            source_identity=self.source_identity,
            destination=self.destination_workload,
            service=self.destination_service,
            mutual_tls=self.mutual_tls,
            destination_described=self.destination_described,
            destination_identity=self.destination_identity if self.destination_described else None,
        )
        if self.announced:
            self.announced_labels = found
        return found

    def broke(self, why: str, fault: BaseException | None) -> None:
        """Note that its stream ended, and with which fault of its tunnel."""
        self.error = self.error or why
        if self.flag is ResponseFlag.NONE and isinstance(fault, RevokedError):
            self.flag = flag_of(fault)

    def fail(self, error: BaseException) -> None:
        """Note why it ends, unless something else was to blame before."""
        self.error = self.error or (error.what if isinstance(error, MeshbpfError) else str(error))
        if self.flag is ResponseFlag.NONE:
            self.flag = flag_of(error)

    def deny(self, decision: Decision) -> None:
        """Cut the connection: its owner's scope is cancelled and answers with a reset."""
        self.denied = True
        self.error = f"closed due to policy change: {decision.reason}"
        self.scope.cancel()


@dataclass(frozen=True, slots=True)
class ConnectionStatistics:
    """Totals since the agent started."""

    open_outbound: int
    open_inbound: int
    opened: int
    failed: int
    denied: int
    cut_by_policy: int
    bytes_sent: int
    bytes_received: int


class ConnectionRegistry:
    """All live connections of all pods."""

    def __init__(
        self,
        wall_clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        telemetry: Telemetry | None = None,
    ) -> None:
        self.telemetry = telemetry or Telemetry(wall_clock=wall_clock, monotonic=monotonic)
        self._wall_clock = wall_clock
        self._monotonic = monotonic
        self._ids = itertools.count(1)
        self._live: dict[int, LiveConnection] = {}
        self._opened = 0
        self._failed = 0
        self._refused = 0
        self._cut = 0
        self._bytes_sent = 0
        self._bytes_received = 0

    @contextmanager
    def track(
        self,
        pod: LocalPod,
        direction: Direction,
        transport: Transport,
        source: SocketAddress,
        destination: SocketAddress,
        traceparent: str = "",
    ) -> Iterator[LiveConnection]:
        """Register a connection for as long as the block runs, then tell of its end.

        `traceparent` is what the client said of the trace that it belongs to.

        The block calls `announce` once it knows both ends; if it never does,
        they are told as they are at the end.
        """
        live = LiveConnection(
            id=next(self._ids),
            pod=pod,
            direction=direction,
            transport=transport,
            source=source,
            destination=destination,
            opened_at=self._wall_clock(),
            opened_monotonic=self._monotonic(),
            trace=self.telemetry.trace(traceparent),
        )
        self._live[live.id] = live
        self._opened += 1
        try:
            yield live
        finally:
            del self._live[live.id]
            self._bytes_sent += live.sent.total
            self._bytes_received += live.received.total
            if live.error:
                self._failed += 1
            self.announce(live)
            self.telemetry.closed(live)

    def announce(self, live: LiveConnection) -> None:
        """Both ends are known: count the connection as opened. Twice is as good as once."""
        if not live.announced:
            live.announced = True
            self.telemetry.opened(live)

    def refused(self) -> None:
        """Count a connection that policy did not admit."""
        self._refused += 1

    def list(self) -> Sequence[ConnectionRecord]:
        """Every live connection, oldest first."""
        now = self._monotonic()
        return [_record(live, now) for live in self._live.values()]

    def recheck(self, mesh: Snapshot) -> int:
        """Cut the inbound connections that `mesh` no longer allows; says how many.

        The workload is looked up anew, so a policy that was attached to it
        only now counts as well. A pod that the state no longer knows has no
        policy that could allow anything: its connections are cut too.
        """
        cut = 0
        in_force: dict[LocalPod, Admission | None] = {}
        # Of the many connections between two pods policy sees no difference.
        decisions: dict[tuple[LocalPod, ConnectionFacts], Decision] = {}
        for live in list(self._live.values()):
            if live.facts is None or live.denied:
                continue
            pod = live.pod
            if pod not in in_force:
                workload = pod.workload(mesh)
                in_force[pod] = None if workload is None else admission(mesh, workload)
            rules = in_force[pod]
            if rules is not None and rules.says_as(live.judged_by):
                continue  # nothing that it was judged by has changed
            case = (pod, live.facts)
            if (decision := decisions.get(case)) is None:
                decision = decisions[case] = decide(pod, live.facts, mesh)
            live.judged_by = rules
            if not decision.allowed:
                live.deny(decision)
                cut += 1
        self._cut += cut
        return cut

    def statistics(self) -> ConnectionStatistics:
        """Totals, live bytes included."""
        live = self._live.values()
        outbound = sum(1 for each in live if each.direction is Direction.OUTBOUND)
        return ConnectionStatistics(
            open_outbound=outbound,
            open_inbound=len(self._live) - outbound,
            opened=self._opened,
            failed=self._failed,
            denied=self._refused,
            cut_by_policy=self._cut,
            bytes_sent=self._bytes_sent + sum(each.sent.total for each in live),
            bytes_received=self._bytes_received + sum(each.received.total for each in live),
        )


def decide(pod: LocalPod, facts: ConnectionFacts, mesh: Snapshot) -> Decision:
    """What policy says of an inbound connection under `mesh`; no workload means no."""
    workload = pod.workload(mesh)
    if workload is None:
        return Decision(
            allowed=False, policy=None, reason=f"{pod.key} is not in the mesh state", dry_run=()
        )
    return admission(mesh, workload).decide(facts)


def _record(live: LiveConnection, now: float) -> ConnectionRecord:
    return ConnectionRecord(
        id=live.id,
        pod=live.pod.key,
        direction=live.direction,
        transport=live.transport,
        state=live.state,
        source=live.source,
        destination=live.destination,
        upstream=live.upstream,
        source_identity=live.source_identity,
        destination_identity=live.destination_identity,
        service=live.service,
        opened_at=live.opened_at,
        age_s=now - live.opened_monotonic,
        bytes_sent=live.sent.total,
        bytes_received=live.received.total,
    )
