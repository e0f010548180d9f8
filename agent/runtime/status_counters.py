"""The counters of the agent's long-lived parts, by part, as `status` shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from meshbpf.agent.datapath.steering import Steering
from meshbpf.agent.runtime.carrying import Carrying
from meshbpf.agent.runtime.control import counters, summed
from meshbpf.agent.runtime.forwarder import Forwarder
from meshbpf.agent.runtime.heartbeat import Heartbeat

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Counters = dict[str, dict[str, int | float]]


def collect(
    parts: Mapping[str, DataclassInstance],
    heartbeat: Heartbeat | None,
    steering: Steering | None,
    carrying: Carrying | None,
    forwarder: Forwarder | None,
) -> Counters:
    """Those of `parts`, which always are, and of those that may not be there yet, or ever."""
    found = {name: counters(part) for name, part in parts.items()}
    if heartbeat is not None:
        found["heartbeat"] = counters(heartbeat.statistics())
    if steering is not None:
        told = steering.statistics()
        found["steering"] = counters(told)
        found["decisions"] = dict(told.decisions)
    if carrying is not None:
        found["kernel_flows"] = counters(carrying.statistics())
    if forwarder is not None:
        forwarded = forwarder.statistics()
        found["forwarder"] = counters(forwarded)
        found["tunnels"] = summed(map(counters, forwarded.pools.values()))
    return found
