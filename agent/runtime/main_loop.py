"""What agent, waypoint and controller have in common: how they end, and how they fail."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import trio

from meshbpf.agent.core.errors import only_known
from meshbpf.agent.runtime.logs import Log

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""They ask for an orderly end."""


@contextmanager
def one_error(log: Log, who: str) -> Iterator[None]:
    """Around `trio.run`: raise the one MeshbpfError inside a group, where that is all there is.

    Any other group is a fault of ours; it is logged and goes on.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        known = only_known(group)
        if known is None:
            log.error(f"{who} failed", cause=group)
            raise
        raise known from group


async def stop_on_signal(log: Log, signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    """Cancel `scope` at the first signal."""
    async for number in signals:
        log.info("stopping", signal=signal.Signals(number).name)
        scope.cancel()
        return
