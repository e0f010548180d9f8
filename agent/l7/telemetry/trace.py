"""W3C trace context (https://www.w3.org/TR/trace-context/), and spans."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from meshbpf.agent.l7.message import Headers

TRACEPARENT = "traceparent"
SPAN = "trace"
"""In `Exchange.attributes`: the SpanContext of a traced request."""

Tags = tuple[tuple[str, str | int], ...]
"""What is told of something, by name."""

_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 1


@dataclass(frozen=True, slots=True)
class SpanContext:
    """Where a request stands in its trace; `parent_id` empty where the trace began here."""

    trace_id: str
    span_id: str
    sampled: bool
    parent_id: str = ""

    @property
    def header(self) -> str:
        """For the next one."""
        return f"00-{self.trace_id}-{self.span_id}-{self.sampled:02x}"


def read_parent(headers: Headers) -> SpanContext | None:
    """What the client says; None without a header that means anything (section 3.2.2)."""
    found = _PARENT.fullmatch(headers.get(TRACEPARENT) or "")
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    # 00 ends here; a later version may say more, and must still be understood this far.
    if (
        version == "ff"
        or (version == "00" and more)
        or not int(trace_id, 16)
        or not int(span_id, 16)
    ):
        return None
    return SpanContext(trace_id, span_id, bool(int(flags, 16) & _SAMPLED))


def begin_span(headers: Headers, rng: random.Random, sampling_percent: float) -> SpanContext:
    """A span under the client's where there is one, whose decision to sample holds."""
    parent = read_parent(headers)
    span_id = f"{rng.getrandbits(64) or 1:016x}"
    if parent is not None:
        return SpanContext(parent.trace_id, span_id, parent.sampled, parent.span_id)
    sampled = rng.random() * 100 < sampling_percent
    return SpanContext(f"{rng.getrandbits(128) or 1:032x}", span_id, sampled)


def propagate(headers: Headers, span: SpanContext) -> None:
    """Tell the next one; a tracestate without a parent that it belongs to means nothing."""
    headers.set(TRACEPARENT, span.header)
    if not span.parent_id:
        headers.remove("tracestate")


@dataclass(frozen=True, slots=True)
class Span:
    """One finished span, for an exporter."""

    context: SpanContext
    name: str
    started_ns: int
    """Wall clock."""
    duration_ns: int
    failed: bool
    tags: Tags
    provider: str
    client: bool = False
    """Whether the one who asks reports it; else the one who is asked does."""
