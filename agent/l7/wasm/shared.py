"""What the plugins of one process share: data with compare-and-swap, and metrics.

Both are bounded, as a guest may make up keys: past the bound new ones are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from meshbpf.agent.l7.wasm.abi import MetricType

MAX_KEYS = 10_000
MAX_VALUE_BYTES = 1024 * 1024
MAX_METRICS = 2_000


class SharedData:
    """Values by key, each with the number of its last change."""

    def __init__(self) -> None:
        self._values: dict[bytes, tuple[bytes, int]] = {}

    def get(self, key: bytes) -> tuple[bytes, int] | None:
        """Value and its number."""
        return self._values.get(key)

    def set(self, key: bytes, value: bytes, cas: int) -> bool | None:
        """Whether it was set: not where `cas` is another number than 0 and the value's.

        None when there is no room.
        """
        known = self._values.get(key)
        if known is not None and cas not in (0, known[1]):
            return False
        if len(value) > MAX_VALUE_BYTES or (known is None and len(self._values) >= MAX_KEYS):
            return None
        # Numbers wrap as the guest's own would, and 0 means "any" to it.
        self._values[key] = (value, (known[1] if known else 0) % 0xFFFF_FFFF + 1)
        return True


@dataclass(slots=True)
class Metric:
    """One metric of a plugin. For a histogram `value` is the sum."""

    name: str
    kind: MetricType
    value: int = 0
    count: int = 0


@dataclass(slots=True)
class PluginMetrics:
    """All metrics of the plugins, numbered from 1."""

    found: list[Metric] = field(default_factory=list)

    def define(self, kind: MetricType, name: str) -> int | None:
        """The number of a metric, made if need be; None past the bound."""
        for number, metric in enumerate(self.found, 1):
            if metric.name == name and metric.kind is kind:
                return number
        if len(self.found) >= MAX_METRICS:
            return None
        self.found.append(Metric(name, kind))
        return len(self.found)

    def at(self, number: int) -> Metric | None:
        """A metric by number."""
        return self.found[number - 1] if 0 < number <= len(self.found) else None
