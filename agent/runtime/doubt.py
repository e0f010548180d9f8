"""A peer that leaves a CONNECT unanswered: is it slow, or is nobody there?

A tunnel of a hung agent looks healthy: its kernel goes on acknowledging, and
a PING takes half a minute to tell. But the hung agent's own node refuses new
connections for it as soon as its heartbeat stops. So after a short silence a
TCP connection is tried to where the tunnel leads: refused means that nobody
answers there, and the app is told within a second; accepted means that the
answer takes its time (the far app may be slow to accept), and we wait on.

The tunnel and its other streams are left alone: an agent that was only paused
goes on where it was.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from meshbpf.agent.runtime.sockets import DialError
from meshbpf.agent.runtime.stream import TunnelStream
from meshbpf.agent.wire.events import ResponseReceived

PATIENCE_S = 0.3
"""An answer within one node or region takes a few milliseconds."""
TRIAL_S = 0.5
"""With PATIENCE_S less than the second in which a dead mesh must refuse."""


async def wait_answer(
    stream: TunnelStream, trial: Callable[[], Awaitable[None]]
) -> ResponseReceived | None:
    """The answer to the stream's CONNECT; None when the stream failed.

    `trial` connects to the tunnel's address and closes again. Raises its
    DialError, or one of our own when it takes longer than TRIAL_S.
    """
    with trio.move_on_after(PATIENCE_S):
        return await stream.wait_response()
    with trio.move_on_after(TRIAL_S) as limit:
        await trial()
    if limit.cancelled_caught:
        raise DialError(
            "peer-silent",
            f"no answer to CONNECT in {PATIENCE_S:g} s, and no connection in {TRIAL_S:g} s more",
            "is the node of the destination reachable?",
        )
    return await stream.wait_response()
