"""Every connection that the agent carries: who, whither, how much, and an end on demand.

The registry is where policy meets live traffic. An inbound connection is
registered *before* its authorization check, so that a policy which arrives
between the two still finds it: either the check reads the new state, or the
recheck that the new state triggers sees the connection.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

import trio

from meshbpf.agent.core.address import SocketAddress
from meshbpf.agent.core.authz import ConnectionFacts, Decision, authorize
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import Workload
from meshbpf.agent.runtime.local_pod import LocalPod
from meshbpf.agent.runtime.stream import ByteCount

access_log = logging.getLogger("access")


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
    destination_workload: Workload | None = None
    service: str = ""
    tunnel_address: SocketAddress | None = None
    """The HBONE end of this connection at the destination's side."""
    sent: ByteCount = field(default_factory=ByteCount)
    """From source to destination; the relay counts here."""
    received: ByteCount = field(default_factory=ByteCount)
    facts: ConnectionFacts | None = None
    """What policy judged an inbound connection by; None while nothing was to judge."""
    error: str = ""
    """Why it failed, for the access log; empty while all is well."""
    finished: bool = False
    """Both directions ended in order; anything else is reset."""
    denied: bool = False
    """Cut by a policy that came after it was admitted."""

    def opened(self, upstream: SocketAddress) -> None:
        """Note that the far leg stands."""
        self.upstream = upstream
        self.state = ConnectionState.OPEN

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
    ) -> None:
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
    ) -> Iterator[LiveConnection]:
        """Register a connection for as long as the block runs, then log its end."""
        live = LiveConnection(
            id=next(self._ids),
            pod=pod,
            direction=direction,
            transport=transport,
            source=source,
            destination=destination,
            opened_at=self._wall_clock(),
            opened_monotonic=self._monotonic(),
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
            self._log_end(live)

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
        for live in list(self._live.values()):
            if live.facts is None or live.denied:
                continue
            decision = decide(live.pod, live.facts, mesh)
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

    def _log_end(self, live: LiveConnection) -> None:
        level = logging.ERROR if live.error else logging.INFO
        if access_log.isEnabledFor(level):
            duration_ms = (self._monotonic() - live.opened_monotonic) * 1000
            access_log.log(
                level, "connection complete", extra={"fields": _fields(live, duration_ms)}
            )


def decide(pod: LocalPod, facts: ConnectionFacts, mesh: Snapshot) -> Decision:
    """What policy says of an inbound connection under `mesh`; no workload means no."""
    workload = pod.workload(mesh)
    if workload is None:
        return Decision(
            allowed=False, policy=None, reason=f"{pod.key} is not in the mesh state", dry_run=()
        )
    return authorize(mesh.policies_for(workload), facts)


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


def _fields(live: LiveConnection, duration_ms: float) -> dict[str, object]:
    """The access log's fields, named as ztunnel names them, so that its parsers fit.

    bytes_sent is what this node's pod sent, in either direction.
    """
    inbound = live.direction is Direction.INBOUND
    sent, received = live.sent.total, live.received.total
    source, destination = live.source_workload, live.destination_workload
    fields: dict[str, object | None] = {
        "src.addr": str(live.source),
        "src.workload": source and source.name,
        "src.namespace": source and source.namespace,
        "src.identity": live.source_identity and str(live.source_identity),
        "dst.addr": str(live.tunnel_address or live.upstream or live.destination),
        "dst.hbone_addr": str(live.target) if live.tunnel_address else None,
        "dst.service": live.service or None,
        "dst.workload": destination and destination.name,
        "dst.namespace": destination and destination.namespace,
        "dst.identity": live.destination_identity and str(live.destination_identity),
        "direction": str(live.direction),
        "bytes_sent": received if inbound else sent,
        "bytes_recv": sent if inbound else received,
        "duration": f"{duration_ms:.0f}ms",
        "error": live.error or None,
    }
    return {name: value for name, value in fields.items() if value is not None}
