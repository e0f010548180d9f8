"""What is told of connections: metrics, the access log, and the last denials.

The registry of connections calls here at three moments: when a connection's
ends are known (`opened`), when it is over (`closed`), and when one is refused
before that (`denied_early`). The second and third cost some microseconds; no
chunk of data costs anything.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from meshbpf.agent.core.address import SocketAddress
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.identity import IdentityError
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.traffic import Reporter, ResponseFlag
from meshbpf.agent.core.workload import Workload
from meshbpf.agent.runtime import access_log
from meshbpf.agent.runtime.traffic_metrics import GRACE_S, Owner, TrafficMetrics, owner
from meshbpf.agent.wire.errors import PeerError, TlsError

if TYPE_CHECKING:
    from meshbpf.agent.l7.telemetry.trace import SpanContext
    from meshbpf.agent.runtime.connections import LiveConnection
    from meshbpf.agent.runtime.otlp_export import OtlpExporter

DENIALS_KEPT = 100
_SWEEP_BATCH = 2000
"""Workloads looked at between two chances for others to run."""

# What `certs.py` and `identity.py` raise when there is no identity to show.
_NO_IDENTITY = frozenset({"identity-not-here", "certificate-expired", "wrong-certificate"})


@dataclass(frozen=True, slots=True)
class Denial:
    """One connection that was not let through."""

    at: float
    """Unix time, seconds."""
    direction: str
    source: str
    destination: str
    reason: str


def flag_of(error: BaseException) -> ResponseFlag:
    """Why a connection failed, in the words of the `response_flags` label."""
    if isinstance(error, MeshbpfError) and error.code == "cert-revoked":
        return ResponseFlag.CERT_REVOKED
    if isinstance(error, TlsError):
        return ResponseFlag.TLS_FAILURE
    if isinstance(error, PeerError):
        return ResponseFlag.H2_HANDSHAKE_FAILURE
    if isinstance(error, IdentityError):
        return ResponseFlag.IDENTITY_ERROR
    if isinstance(error, MeshbpfError):
        if error.code == "policy-denied":
            return ResponseFlag.DENY
        if error.code == "stream-failed":
            return ResponseFlag.H2_HANDSHAKE_FAILURE
        if error.code in _NO_IDENTITY:
            return ResponseFlag.IDENTITY_ERROR
        if error.code == "gateway-timeout":
            # Nothing answered at port 15008 of a pod that speaks HBONE: most
            # often a NetworkPolicy that lets only the app's port through.
            return ResponseFlag.NETWORK_POLICY
    return ResponseFlag.CONNECT


class Telemetry:
    """Told by the registry; asked by the metrics port and the status page."""

    def __init__(
        self,
        *,
        allowed_labels: Collection[str] | None = None,
        grace_s: float = GRACE_S,
        wall_clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        exporter: OtlpExporter | None = None,
    ) -> None:
        self.exporter = exporter
        self.traffic = TrafficMetrics(monotonic, allowed=allowed_labels, grace_s=grace_s)
        self._wall_clock = wall_clock
        self._monotonic = monotonic
        self._denials: deque[Denial] = deque(maxlen=DENIALS_KEPT)
        self._early: Counter[tuple[str, str]] = Counter()

    def trace(self, traceparent: str) -> SpanContext | None:
        """The span of a connection that begins; None where spans are not exported."""
        return None if self.exporter is None else self.exporter.begin(traceparent)

    def opened(self, live: LiveConnection) -> None:
        """Both ends of `live` are known, as far as they ever will be."""
        labels = live.labels()
        self.traffic.opened(live, labels)
        access_log.opened(live, labels)

    def closed(self, live: LiveConnection) -> None:
        """`live` is over; it was `opened` before."""
        labels = live.labels()
        flag = ResponseFlag.NONE
        if live.error:
            flag = ResponseFlag.DENY if live.denied else live.flag
            if flag is ResponseFlag.NONE:
                flag = ResponseFlag.CONNECT
        self.traffic.closed(live, labels, flag)
        duration_s = self._monotonic() - live.opened_monotonic
        fields = None
        if self.exporter is not None:
            fields = access_log.complete_fields(live, labels, duration_s)
            self.exporter.ended(live, fields, duration_s)
        access_log.complete(live, labels, duration_s, fields)
        if flag is ResponseFlag.DENY:
            self._remember(live.reporter, live.source, live.target or live.destination, live.error)

    def denied_early(
        self,
        reporter: Reporter,
        source: SocketAddress,
        destination: SocketAddress,
        error: MeshbpfError,
    ) -> None:
        """A connection was refused before its ends were known."""
        self._early[reporter.value, error.code] += 1
        access_log.denied_early(source, destination, reporter, error.what)
        self._remember(reporter, source, destination, error.what)

    def denials(self) -> Sequence[Denial]:
        """The last DENIALS_KEPT of them, newest first."""
        return tuple(reversed(self._denials))

    def denied_early_counts(self) -> dict[tuple[str, str], int]:
        """By (reporter, error code), since the start."""
        return dict(self._early)

    async def expire(self, mesh: Snapshot, local: Collection[Workload]) -> int:
        """Forget series of workloads that are gone; says how many.

        `local` are the workloads of this node's pods. Looks at the whole mesh
        only when some series is old enough to go, and lets others run meanwhile.
        """
        await trio.lowlevel.checkpoint()
        if not self.traffic.idle():
            return 0
        known: set[Owner] = set()
        for count, workload in enumerate(mesh.workloads, 1):
            known.add(owner(workload))
            if count % _SWEEP_BATCH == 0:
                await trio.lowlevel.checkpoint()
        here = {owner(workload) for workload in local}
        return self.traffic.expire(known.__contains__, here.__contains__)

    def _remember(
        self, reporter: Reporter, source: SocketAddress, destination: SocketAddress, reason: str
    ) -> None:
        direction = "outbound" if reporter is Reporter.SOURCE else "inbound"
        self._denials.append(
            Denial(self._wall_clock(), direction, str(source), str(destination), reason)
        )
