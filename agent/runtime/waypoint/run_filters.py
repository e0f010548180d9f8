"""Runs filters: calls their hooks, and does what those that wait ask for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.l7.exchange import Exchange
from meshbpf.agent.l7.filter import (
    CONTINUE,
    Body,
    Call,
    CallAnswer,
    CallFailed,
    Chain,
    Continue,
    Outcome,
    ReadBody,
    Reply,
    SetBody,
    Steps,
)
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.runtime.waypoint.body import BodySource

log = Log("waypoint")

FAULT = Reply(500, detail="filter_failed")
_CALL_DEPTH_LIMIT = 64
"""Commands of one hook: a filter that asks for ever is at fault."""

Caller = Callable[[Call], Awaitable[CallAnswer | CallFailed]]
T = TypeVar("T")  # an exchange, or an opaque connection


async def run_hook(
    hook: Callable[[T], Outcome | Steps], subject: T, body: BodySource, call: Caller
) -> Outcome:
    """One hook to its outcome. A hook that raises is a fault of ours: 500, and logged."""
    try:
        found = hook(subject)
        if isinstance(found, Reply) or found is CONTINUE:
            return found
        if isinstance(found, Continue):
            return CONTINUE
    except Exception as error:  # noqa: BLE001
        # boundary: a bug in one filter costs one request, closed, and is seen
        log.error("filter failed", cause=error, hook=getattr(hook, "__qualname__", ""))
        return FAULT
    return await _steps(found, body, call)


async def _steps(steps: Steps, body: BodySource, call: Caller) -> Outcome:
    answer: object = None
    try:
        for _ in range(_CALL_DEPTH_LIMIT):
            try:
                command = steps.send(answer)
            except StopIteration as done:
                outcome: Outcome = done.value
                return outcome
            match command:
                case ReadBody(limit_bytes):
                    await body.gather(limit_bytes)
                    answer = Body(body.kept[:limit_bytes], _within(body, limit_bytes))
                case SetBody(data):
                    body.replace(data)
                    answer = None
                case Call():
                    answer = await call(command)
        log.error("filter asks for ever", filter=steps)
    except MeshbpfError:
        raise  # of the connection: the client or the endpoint has gone
    except Exception as error:  # noqa: BLE001
        # boundary: as above
        log.error("filter failed", cause=error)
    finally:
        steps.close()
    return FAULT


def _within(body: BodySource, limit_bytes: int) -> bool:
    return body.complete and len(body.kept) <= limit_bytes


def end(chain: Chain, exchange: Exchange) -> None:
    """Tell all that the exchange is over."""
    for hook in chain.end:
        try:
            hook(exchange)
        except Exception as error:  # noqa: BLE001
            # boundary: the request is over; a fault in one account must not spoil the others
            log.error("filter failed at the end", cause=error)
