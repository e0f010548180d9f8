"""Takes access log lines and connection spans to an OpenTelemetry collector (OTLP over HTTP).

What happens at a connection's end is an append to a queue. Two tasks, one for
lines and one for spans, take batches to the collector every QUEUE_S. While it is
away they wait, longer each time, and the batch stays where it was; what comes
after QUEUE_ITEMS is dropped and counted. A batch that the collector refuses for
good is dropped, too. Encoding goes in turns of TURN_ITEMS, for the event loop
carries connections meanwhile.

A line goes out where the access log writes one: `access=off` silences it here, too.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

import trio

import meshbpf
from meshbpf.agent.config import Settings, otlp_endpoint
from meshbpf.agent.core.backoff import Backoff
from meshbpf.agent.core.traffic import Reporter
from meshbpf.agent.l7.message import Headers
from meshbpf.agent.l7.providers import OTLP_TIMEOUT_S
from meshbpf.agent.l7.telemetry.otlp import (
    LOGS_PATH,
    RETRYABLE,
    TRACES_PATH,
    LogEntry,
    export_request,
    logs_request,
    rejected,
)
from meshbpf.agent.l7.telemetry.trace import TRACEPARENT, Span, SpanContext, Tags, begin_span
from meshbpf.agent.runtime import access_log
from meshbpf.agent.runtime.exposition import Family, Kind, labelled
from meshbpf.agent.runtime.logs import Log, told_fields, told_level
from meshbpf.agent.runtime.otlp_post import Collector, CollectorError, Posted

if TYPE_CHECKING:
    from meshbpf.agent.runtime.connections import LiveConnection

QUEUE_ITEMS = 8192
"""Of each kind: some 15 MiB of lines and spans while a collector is away."""
BATCH_ITEMS = 512
TURN_ITEMS = 32
"""Encoded without a pause."""
QUEUE_S = 1.0
FIRST_PAUSE_S = 1.0
MOST_PAUSE_S = 30.0
FINISH_S = 1.0
"""What a stop gives to the last batches."""
_QUIET_S = 60.0
"""Between two warnings of one kind."""
_ALL_PERCENT = 100.0
_NO_HEADERS = Headers()

log = Log("otlp")


class Poster(Protocol):
    """A collector."""

    async def post(self, path: str, body: bytes) -> Posted:
        """Send `body`. Raises CollectorError."""


@dataclass(frozen=True, slots=True)
class _Ended:
    """A connection that is over: its span, but for what encoding can do as well."""

    context: SpanContext
    name: str
    client: bool
    opened_at: float
    """Unix time, seconds."""
    duration_s: float
    fields: dict[str, object]


@dataclass(slots=True, eq=False)
class _Queue:
    signal: str
    path: str
    encode: Callable[[Sequence[Any]], bytes]
    items: deque[Any] = field(default_factory=deque)
    exported: int = 0
    dropped: int = 0
    warned_s: float = float("-inf")

    def put(self, item: Any) -> None:
        """Never waits."""
        if len(self.items) >= QUEUE_ITEMS:
            self.dropped += 1
        else:
            self.items.append(item)

    def done(self, count: int, lost: int) -> None:
        """The first `count` are settled, of which `lost` did not arrive."""
        for _ in range(count):
            self.items.popleft()
        self.exported += count - lost
        self.dropped += lost

    def complain(self, reason: str, **values: object) -> None:
        """Say it once a minute."""
        if trio.current_time() - self.warned_s >= _QUIET_S:
            self.warned_s = trio.current_time()
            log.warning(f"{self.signal} were not taken", reason=reason, **values)


class OtlpExporter(logging.Handler):
    """Of one agent. A handler of the access log, and told of spans by Telemetry."""

    def __init__(self, collector: Poster, node: str) -> None:
        super().__init__()
        self._collector = collector
        self._resource: Tags = (
            ("service.name", "meshbpf"),
            ("service.version", meshbpf.__version__),
            ("service.instance.id", node),
            ("k8s.node.name", node),
        )
        self._rng = Random()  # noqa: S311 (ids are no secrets)
        self._logs = _Queue("logs", LOGS_PATH, self._encode_logs)
        self._spans = _Queue("spans", TRACES_PATH, self._encode_spans)
        self._ending = trio.Event()
        self._ended = trio.Event()

    # --- told of connections ------------------------------------------------------

    def handle(self, record: logging.LogRecord) -> bool:
        """Take a line of the access log, without the lock that logging.Handler has."""
        self._logs.put(record)
        return True

    def begin(self, traceparent: str = "") -> SpanContext:
        """The span of a connection, under the one whose header the client sent.

        A client that is not sampled (ztunnel never is) has a span nowhere: ours
        is then the first of the client's trace.
        """
        told = _NO_HEADERS
        if traceparent:
            told = Headers([(TRACEPARENT.encode(), traceparent.encode("ascii", "replace"))])
        found = begin_span(told, self._rng, _ALL_PERCENT)
        return found if found.sampled else SpanContext(found.trace_id, found.span_id, True)

    def ended(self, live: LiveConnection, fields: dict[str, object], duration_s: float) -> None:
        """Take the span of a connection that is over, with the fields of its line."""
        if live.trace is not None:
            client = live.reporter is Reporter.SOURCE
            name = f"{live.direction} {live.transport}"
            self._spans.put(_Ended(live.trace, name, client, live.opened_at, duration_s, fields))

    def families(self) -> Iterator[Family]:
        """For /metrics."""
        both = (self._logs, self._spans)
        for name, told, kind, of in (
            ("exported", "Log lines and spans that a collector took", Kind.COUNTER, "exported"),
            ("dropped", "Those that none took, or had no room", Kind.COUNTER, "dropped"),
        ):
            values = {queue.signal: getattr(queue, of) for queue in both}
            yield labelled(f"meshbpf_otlp_records_{name}", told, kind, "signal", values)
        waiting = {queue.signal: len(queue.items) for queue in both}
        told = "Log lines and spans that wait for the collector"
        yield labelled("meshbpf_otlp_records_queued", told, Kind.GAUGE, "signal", waiting)

    # --- sending ------------------------------------------------------------------

    async def run(self) -> None:
        """Send, until cancelled or told to `finish`."""
        access_log.access_log.addHandler(self)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._follow, self._logs)
                nursery.start_soon(self._follow, self._spans)
        finally:
            access_log.access_log.removeHandler(self)
            self._ended.set()

    async def finish(self) -> None:
        """Send what there is, within FINISH_S and without a second attempt; `run` ends."""
        self._ending.set()
        with trio.move_on_after(FINISH_S):
            await self._ended.wait()

    async def _follow(self, queue: _Queue) -> None:
        backoff = Backoff(FIRST_PAUSE_S, MOST_PAUSE_S)
        pause_s = QUEUE_S
        while True:
            with trio.move_on_after(pause_s):
                await self._ending.wait()
            last = self._ending.is_set()
            pause_s = QUEUE_S
            while queue.items:
                if not await self._send(queue):
                    pause_s = backoff.next_s()
                    break
                backoff.reset()
            if last:
                queue.done(len(queue.items), len(queue.items))
                return

    async def _send(self, queue: _Queue) -> bool:
        """Whether the oldest batch is settled; else it stays."""
        batch = list(islice(queue.items, BATCH_ITEMS))
        body = bytearray()
        for at in range(0, len(batch), TURN_ITEMS):
            body += queue.encode(batch[at : at + TURN_ITEMS])
            await trio.lowlevel.checkpoint()
        try:
            answer = await self._collector.post(queue.path, bytes(body))
        except CollectorError as error:
            queue.complain(error.what, hint=error.hint)
            return False
        if answer.status in RETRYABLE:
            queue.complain(f"{self._collector} answered {answer.status}")
            return False
        lost = len(batch)
        if answer.status != 200:
            queue.complain(f"{self._collector} answered {answer.status}")
        else:
            try:
                lost, why = rejected(answer.body)
            except ValueError as error:
                lost, why = 0, f"the answer with 200 is no OTLP: {error}"
            if lost or why:
                queue.complain(f"{self._collector}: {why}", rejected=lost)
        queue.done(len(batch), min(lost, len(batch)))
        return True

    def _encode_spans(self, ended: Sequence[_Ended]) -> bytes:
        spans = [
            Span(
                context=one.context,
                name=one.name,
                started_ns=int(one.opened_at * 1e9),
                duration_ns=int(one.duration_s * 1e9),
                failed=bool(one.fields.get("error")),
                tags=_tags(one.fields),
                provider="",
                client=one.client,
            )
            for one in ended
        ]
        return export_request(self._resource, spans).SerializeToString()

    def _encode_logs(self, records: Sequence[logging.LogRecord]) -> bytes:
        entries = [
            LogEntry(
                at_ns=int(record.created * 1e9),
                severity=told_level(record),
                body=record.getMessage(),
                tags=_tags(told_fields(record)),
                context=getattr(record, access_log.TRACE, None),
            )
            for record in records
        ]
        return logs_request(self._resource, entries).SerializeToString()


def _tags(fields: dict[str, object]) -> Tags:
    """Values come from peers: what is no UTF-8 would not be encoded."""
    return tuple(
        (name, value if isinstance(value, int) else _text(str(value)))
        for name, value in fields.items()
        if value not in (None, "")
    )


def _text(value: str) -> str:
    return value.encode("utf-8", "replace").decode()


def exporter_of(settings: Settings) -> OtlpExporter | None:
    """To the collector that the settings name; None when they name none."""
    endpoint = otlp_endpoint(settings.otlp) if settings.otlp else None
    if endpoint is None:
        return None
    return OtlpExporter(Collector(endpoint, OTLP_TIMEOUT_S), settings.node)
