"""Istio's TCP metrics of opaque connections, with `reporter="waypoint"`.

Bytes are counted as they go, so that a connection that lasts for days is not
told of at its end alone. The bound is MAX_SERIES sets of labels; what comes
after that is counted in one set whose labels are all `unknown`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from meshbpf.agent.core.service import Service
from meshbpf.agent.core.traffic import UNKNOWN
from meshbpf.agent.core.workload import Workload
from meshbpf.agent.l7.exchange import Connection, Flag
from meshbpf.agent.l7.telemetry.labels import LABELS, Labels, ends_of, security_of
from meshbpf.agent.l7.telemetry.request_metrics import MAX_SERIES

TCP_LABELS = tuple(name for name in LABELS if name not in ("response_code", "grpc_response_status"))


@dataclass(slots=True, eq=False)
class TcpSeries:
    """Totals under one set of labels."""

    labels: Labels
    opened: int = 0
    closed: int = 0
    received_bytes: int = 0
    """From clients."""
    sent_bytes: int = 0
    """To clients."""


class TcpMetrics:
    """All series of a process."""

    def __init__(self, *, max_series: int = MAX_SERIES) -> None:
        self._max_series = max_series
        self._series: dict[Labels, TcpSeries] = {}

    def series(
        self,
        connection: Connection,
        endpoint: Workload | None,
        service: Service | None,
        flags: tuple[Flag, ...] = (),
    ) -> TcpSeries:
        """Where a connection to `endpoint` (None: to nobody) of `service` is counted."""
        asked = service or connection.destination.service
        labels = (
            "waypoint",
            *ends_of(connection.caller, endpoint, asked),
            "tcp",
            ",".join(flags) or "-",
            security_of(connection.caller),
        )
        found = self._series.get(labels)
        if found is None:
            if len(self._series) >= self._max_series:
                labels = _UNKNOWN
            found = self._series.setdefault(labels, TcpSeries(labels))
        return found

    def __iter__(self) -> Iterator[TcpSeries]:
        return iter(list(self._series.values()))

    def __len__(self) -> int:
        return len(self._series)


_UNKNOWN = ("waypoint", *(UNKNOWN,) * (len(TCP_LABELS) - 1))
