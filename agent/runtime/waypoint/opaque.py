"""Two channels joined: bytes that nobody looks at."""

from __future__ import annotations

from collections.abc import Callable

import trio

from meshbpf.agent.runtime.waypoint.channel import BrokenError, Channel


async def join(
    one: Channel,
    other: Channel,
    carried: Callable[[int, int], None],
    *,
    to_other: bytes = b"",
    to_one: bytes = b"",
) -> None:
    """Carry bytes until both directions have ended; close both in any case.

    `carried` is told of bytes from the first channel, and from the second.
    `to_other` and `to_one` were received before, and go first. Raises
    BrokenError when either breaks; the other is then reset.
    """

    async def forth() -> None:
        data = to_other or await one.receive()
        while data:
            carried(len(data), 0)
            await other.send(data)
            data = await one.receive()
        await other.send_eof()

    async def back() -> None:
        data = to_one or await other.receive()
        while data:
            carried(0, len(data))
            await one.send(data)
            data = await other.receive()
        await one.send_eof()

    broken: list[BrokenError] = []

    async def run(direction: object, scope: trio.CancelScope) -> None:
        assert callable(direction)  # noqa: S101 (for the type checker)
        try:
            await direction()
        except BrokenError as error:
            broken.append(error)
            scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, forth, nursery.cancel_scope)
            nursery.start_soon(run, back, nursery.cancel_scope)
        if broken:
            raise broken[0]
    finally:
        one.close()
        other.close()
