"""Takes spans to collectors, in batches, and never holds a request up for it.

Bounds: QUEUE_SPANS wait for each provider; what comes after that is dropped
and counted. A batch that a collector does not take is dropped, too: it is
telemetry, and the next one comes in a second.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from meshbpf.agent.l7.filter import Call, CallAnswer, CallFailed
from meshbpf.agent.l7.providers import OtlpTracing
from meshbpf.agent.l7.telemetry.otlp import export_call, export_failure
from meshbpf.agent.l7.telemetry.trace import Span
from meshbpf.agent.runtime.logs import Log

QUEUE_SPANS = 2048
BATCH_SPANS = 512
INTERVAL_S = 1.0
_QUIET_S = 60.0
"""Between two warnings about one collector."""

Caller = Callable[[Call], Awaitable[CallAnswer | CallFailed]]

log = Log("waypoint")


@dataclass(slots=True)
class ExportStatistics:
    """Spans since the start."""

    exported: int = 0
    dropped: int = 0


@dataclass(slots=True, eq=False)
class _Queue:
    spans: deque[Span] = field(default_factory=deque)
    warned_s: float = float("-inf")


class SpanExporter:
    """One task for all providers."""

    def __init__(self, service: str) -> None:
        """`service` is what collectors call this waypoint: `waypoint.shop`."""
        self._service = service
        self._queues: dict[OtlpTracing, _Queue] = {}
        self.statistics = ExportStatistics()

    def export(self, provider: OtlpTracing, span: Span) -> None:
        """Take a span; never waits."""
        queue = self._queues.get(provider)
        if queue is None:
            queue = self._queues[provider] = _Queue()
        if len(queue.spans) >= QUEUE_SPANS:
            self.statistics.dropped += 1
        else:
            queue.spans.append(span)

    async def run(self, call: Caller) -> None:
        """Send what there is, every INTERVAL_S."""
        while True:
            await trio.sleep(INTERVAL_S)
            async with trio.open_nursery() as nursery:
                for provider, queue in list(self._queues.items()):
                    nursery.start_soon(self._send, call, provider, queue)

    async def _send(self, call: Caller, provider: OtlpTracing, queue: _Queue) -> None:
        while queue.spans:
            size = min(len(queue.spans), BATCH_SPANS)
            batch = [queue.spans.popleft() for _ in range(size)]
            answer = await call(export_call(provider, self._service, batch))
            failure = export_failure(provider, answer)
            if not failure:
                self.statistics.exported += size
                continue
            self.statistics.dropped += size
            if trio.current_time() - queue.warned_s >= _QUIET_S:
                queue.warned_s = trio.current_time()
                log.warning("spans were not taken", provider=provider.name, reason=failure)
            return  # the next round tries again
