"""Istio's TCP metrics of the connections that this agent carries.

A connection costs two dictionary look-ups when it opens and one when it ends;
its bytes are read from the counters that the relay keeps anyway, when it ends
and whenever somebody scrapes, so a chunk costs nothing.

A series lives as long as what it is about. Once no connection uses it and its
workloads are gone from the mesh state (or the local one has no pod on this
node any more), it stays for a grace period, so that the last scrape sees the
end, and is then forgotten. ztunnel keeps every series until it restarts.
Deployments and not pods name a series, so a rolling update changes none: what
counts is whether *some* workload still has the labels.

Bounds: `max_series`; what comes after that is counted in one series a
reporter whose labels are all `unknown`, so that sums stay true.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from meshbpf.agent.core.errors import ConfigError
from meshbpf.agent.core.traffic import FLAG_AT, LABELS, UNKNOWN, Labels, Reporter, ResponseFlag
from meshbpf.agent.core.workload import Workload
from meshbpf.agent.runtime.exposition import Family, Kind, label_text

if TYPE_CHECKING:
    from meshbpf.agent.runtime.connections import LiveConnection

MAX_SERIES = 20_000
GRACE_S = 300.0

_WORKLOAD_AT = {
    Reporter.SOURCE: tuple(
        LABELS.index(f"source_{name}") for name in ("workload", "workload_namespace", "cluster")
    ),
    Reporter.DESTINATION: tuple(
        LABELS.index(f"destination_{name}")
        for name in ("workload", "workload_namespace", "cluster")
    ),
}

Owner = tuple[str, str, str]
"""What names a workload in labels: name, namespace, cluster."""


@dataclass(slots=True, eq=False)
class Series:
    """The counters of one set of labels."""

    text: str
    """The labels as they are written."""
    reporter: Reporter
    source: Owner
    destination: Owner
    used_at: float
    live: int = 0
    opened: int = 0
    closed: int = 0
    failed: int = 0
    received: int = 0
    sent: int = 0


@dataclass(frozen=True, slots=True)
class Carried:
    """What connections of one set of labels have added that the kernel carries."""

    opened: int
    closed: int
    failed: int
    sent: int
    """Bytes from source to destination."""
    received: int


@dataclass(frozen=True, slots=True)
class Flow:
    """Totals from one workload to another, for people."""

    source: str
    destination: str
    connections: int
    bytes_sent: int
    bytes_received: int


def check_allowed(names: Iterable[str]) -> frozenset[str]:
    """The label allow-list; ConfigError (unknown-label) for a name that no series has."""
    allowed = frozenset(names)
    unknown = sorted(allowed - set(LABELS))
    if unknown:
        raise ConfigError(
            "unknown-label",
            f"{unknown[0]!r} is not a label of istio_tcp_* metrics",
            f"one of: {', '.join(LABELS)}",
        )
    return allowed


class TrafficMetrics:
    """All series; used from the event loop's thread only."""

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        allowed: Collection[str] | None = None,
        grace_s: float = GRACE_S,
        max_series: int = MAX_SERIES,
    ) -> None:
        """`allowed` None means every label; series that differ in others only become one."""
        self._clock = clock
        self._grace_s = grace_s
        self._max_series = max_series
        self._kept = (
            None
            if allowed is None
            else tuple(index for index, name in enumerate(LABELS) if name in allowed)
        )
        self._names = LABELS if self._kept is None else tuple(LABELS[i] for i in self._kept)
        # `_by_labels` finds by all labels; where an allow-list makes several
        # sets one, they share the Series that `_series` has once.
        self._by_labels: dict[Labels, Series] = {}
        self._series: dict[Labels, Series] = {}
        self._live: dict[int, tuple[LiveConnection, Series]] = {}
        self._sockets = {Reporter.SOURCE: 0, Reporter.DESTINATION: 0}
        self._expired = 0
        self._overflowed = 0

    # --- what happens -------------------------------------------------------

    def opened(self, live: LiveConnection, labels: Labels) -> None:
        """A connection began."""
        series = self._find(labels)
        series.opened += 1
        series.live += 1
        self._live[live.id] = (live, series)

    def closed(self, live: LiveConnection, labels: Labels, flag: ResponseFlag) -> None:
        """It ended. The end counts under its flag, the bytes where it opened."""
        _live, series = self._live.pop(live.id)
        series.live -= 1
        series.received += live.sent.total
        series.sent += live.received.total
        now = series.used_at = self._clock()
        if flag is not ResponseFlag.NONE:
            series = self._find((*labels[:FLAG_AT], flag.value, *labels[FLAG_AT + 1 :]))
            series.failed += 1
            series.used_at = now
        series.closed += 1

    def carried(self, labels: Labels, added: Carried) -> None:
        """Connections that no task of ours carried; they are told of in sums."""
        series = self._find(labels)
        series.opened += added.opened
        # Those that an earlier agent counted as opened end here without it.
        series.live = max(0, series.live + added.opened - added.closed)
        series.closed += added.closed
        series.received += added.sent
        series.sent += added.received
        now = series.used_at = self._clock()
        if added.failed:
            flag = ResponseFlag.CONNECT.value
            # As one that the agent carries: opened here, its end under its flag.
            series.opened += added.failed
            failed = self._find((*labels[:FLAG_AT], flag, *labels[FLAG_AT + 1 :]))
            failed.failed += added.failed
            failed.closed += added.failed
            failed.used_at = now

    def socket_opened(self, reporter: Reporter) -> None:
        """A captured connection or tunnel was accepted."""
        self._sockets[reporter] += 1

    def socket_closed(self, reporter: Reporter) -> None:
        """It was closed."""
        self._sockets[reporter] -= 1

    def expire(self, known: Callable[[Owner], bool], local: Callable[[Owner], bool]) -> int:
        """Forget the series whose workloads are gone and whose grace is over; says how many.

        `known` tells whether the mesh state has such a workload, `local`
        whether one with these labels runs on this node.
        """
        before = self._clock() - self._grace_s
        gone = set()
        for key, series in self._series.items():
            if series.live or series.used_at > before:
                continue
            ours, theirs = series.source, series.destination
            if series.reporter is Reporter.DESTINATION:
                ours, theirs = theirs, ours
            if not local(ours) or not (theirs[0] == UNKNOWN or known(theirs)):
                gone.add(key)
        if gone:
            forgotten = {id(self._series.pop(key)) for key in gone}
            self._by_labels = {
                labels: series
                for labels, series in self._by_labels.items()
                if id(series) not in forgotten
            }
            self._expired += len(gone)
        return len(gone)

    def idle(self) -> bool:
        """Whether `expire` could find anything at all."""
        before = self._clock() - self._grace_s
        return any(not one.live and one.used_at <= before for one in self._series.values())

    # --- what is told -------------------------------------------------------

    def families(self) -> Sequence[Family]:
        """Every family, with what live connections have carried so far."""
        received: dict[int, int] = {}
        sent: dict[int, int] = {}
        for live, series in self._live.values():
            received[id(series)] = received.get(id(series), 0) + live.sent.total
            sent[id(series)] = sent.get(id(series), 0) + live.received.total
        found = list(self._series.values())
        begun = [one for one in found if one.opened]
        return (
            _family(
                "tcp_connections_opened",
                "The total number of TCP connections opened",
                ((one.text, one.opened) for one in begun),
            ),
            _family(
                "tcp_connections_closed",
                "The total number of TCP connections closed",
                ((one.text, one.closed) for one in found if one.closed),
            ),
            _family(
                "tcp_received_bytes",
                "The size of total bytes received during request in case of a TCP connection",
                ((one.text, one.received + received.get(id(one), 0)) for one in begun),
            ),
            _family(
                "tcp_sent_bytes",
                "The size of total bytes sent during response in case of a TCP connection",
                ((one.text, one.sent + sent.get(id(one), 0)) for one in begun),
            ),
            _family(
                "tcp_connections_failed",
                "The total number of TCP connections that failed to establish (unstable)",
                ((one.text, one.failed) for one in found if one.failed),
            ),
            Family(
                "istio_tcp_sockets_open",
                "The current number of open TCP sockets (unstable)",
                Kind.GAUGE,
                [
                    (label_text(("reporter",), (reporter.value,)), count)
                    for reporter, count in self._sockets.items()
                ],
            ),
            Family(
                "meshbpf_metrics_series",
                "Series of istio_tcp_* metrics that are kept now",
                Kind.GAUGE,
                [("", len(self._series))],
            ),
            Family(
                "meshbpf_metrics_series_expired",
                "Series that were forgotten after their workload was gone",
                Kind.COUNTER,
                [("", self._expired)],
            ),
            Family(
                "meshbpf_metrics_series_overflowed",
                "Connections counted without labels because there were too many series",
                Kind.COUNTER,
                [("", self._overflowed)],
            ),
        )

    def top_flows(self, count: int) -> list[Flow]:
        """The `count` pairs of workloads with the most bytes since their series began."""
        totals: dict[tuple[str, str], list[int]] = {}
        for one in self._series.values():
            totals_of = totals.setdefault((_name(one.source), _name(one.destination)), [0, 0, 0])
            totals_of[0] += one.opened
            totals_of[1] += one.received
            totals_of[2] += one.sent
        for live, one in self._live.values():
            totals_of = totals[_name(one.source), _name(one.destination)]
            totals_of[1] += live.sent.total
            totals_of[2] += live.received.total
        ordered = sorted(totals.items(), key=lambda item: -(item[1][1] + item[1][2]))
        return [
            Flow(source, destination, opened, sent, received)
            for (source, destination), (opened, sent, received) in ordered[:count]
        ]

    # --- parts --------------------------------------------------------------

    def _find(self, labels: Labels) -> Series:
        series = self._by_labels.get(labels)
        if series is None:
            series = self._make(labels)
        return series

    def _make(self, labels: Labels) -> Series:
        key = labels if self._kept is None else tuple(labels[index] for index in self._kept)
        series = self._series.get(key)
        if series is None:
            if len(self._series) >= self._max_series:
                self._overflowed += 1
                labels = (labels[0], *((UNKNOWN,) * (len(LABELS) - 1)))
                key = labels if self._kept is None else tuple(labels[i] for i in self._kept)
                if key in self._series:
                    return self._series[key]
            source, destination = (
                tuple(labels[index] for index in _WORKLOAD_AT[side])
                for side in (Reporter.SOURCE, Reporter.DESTINATION)
            )
            series = self._series[key] = Series(
                text=label_text(self._names, key),
                reporter=Reporter(labels[0]),
                source=(source[0], source[1], source[2]),
                destination=(destination[0], destination[1], destination[2]),
                used_at=self._clock(),
            )
        if len(self._by_labels) < 2 * self._max_series:
            self._by_labels[labels] = series
        return series


def owner(workload: Workload) -> Owner:
    """The labels that name a workload."""
    return (
        workload.workload_name or UNKNOWN,
        workload.namespace or UNKNOWN,
        workload.cluster_id or UNKNOWN,
    )


def _name(one: Owner) -> str:
    return UNKNOWN if one[0] == UNKNOWN else f"{one[1]}/{one[0]}"


def _family(name: str, told: str, samples: Iterable[tuple[str, int]]) -> Family:
    return Family(f"istio_{name}", told, Kind.COUNTER, samples)
