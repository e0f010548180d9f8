"""A pod's connections over the time of a test, and what became of each.

    python3 -m tests.nspawn.traffic ADDRESS PORT [--streams 100] [--every 0.02] [--direct PORT]

Runs until its standard input ends, then prints one JSON object and ends. It knows of no mesh:
`streams` connections exchange a block every tenth of a second; besides, every
`every` seconds a new connection makes one round trip. `direct` names a port
for ten more streams, which the agent is told to leave alone. Times are
CLOCK_MONOTONIC, the same inside and outside of a node. Prints "ready" when all
streams have had a first answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass, field

BLOCK = b"meshbpf " * 128
PAUSE_S = 0.1
DIRECT_STREAMS = 10
ROUND_TRIP_LIMIT_S = 20.0


@dataclass(slots=True)
class Attempt:
    """One new connection."""

    began: float
    connected: float = 0.0
    """When connect() succeeded; 0 if it never did."""
    answered: float = 0.0
    """When the answer was complete; 0 if it never was."""
    error: str = ""


@dataclass(slots=True)
class Stream:
    """One long connection."""

    blocks: int = 0
    ended: float = 0.0
    error: str = ""


@dataclass(slots=True)
class Report:
    streams: list[Stream] = field(default_factory=list)
    direct: list[Stream] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)


async def stream(address: str, port: int, record: Stream, opened: asyncio.Event) -> None:
    writer = None
    try:
        reader, writer = await asyncio.open_connection(address, port)
        while True:
            writer.write(BLOCK)
            await writer.drain()
            if await reader.readexactly(len(BLOCK)) != BLOCK:
                raise ValueError("the echo differs from what was sent")
            record.blocks += 1
            opened.set()
            await asyncio.sleep(PAUSE_S)
    except (OSError, EOFError, ValueError) as error:
        record.ended, record.error = time.monotonic(), f"{type(error).__name__}: {error}"
        opened.set()
    finally:
        if writer is not None:
            writer.close()


async def attempt(address: str, port: int, record: Attempt) -> None:
    writer = None
    try:
        async with asyncio.timeout(ROUND_TRIP_LIMIT_S):
            reader, writer = await asyncio.open_connection(address, port)
            record.connected = time.monotonic()
            writer.write(BLOCK)
            if await reader.readexactly(len(BLOCK)) != BLOCK:
                raise ValueError("the echo differs from what was sent")
            record.answered = time.monotonic()
    except (OSError, EOFError, ValueError) as error:
        record.error = f"{type(error).__name__}: {error}"
    finally:
        if writer is not None:
            writer.close()


async def run(options: argparse.Namespace) -> Report:
    report = Report()
    stop = asyncio.Event()
    # Not a signal: between us and who sends it stands nsenter, which forks.
    asyncio.get_running_loop().add_reader(sys.stdin, stop.set)
    tasks, opened = [], []
    for kind, port, count in (
        (report.streams, options.port, options.streams),
        (report.direct, options.direct, DIRECT_STREAMS if options.direct else 0),
    ):
        for _ in range(count):
            kind.append(Stream())
            opened.append(asyncio.Event())
            tasks.append(asyncio.create_task(stream(options.address, port, kind[-1], opened[-1])))
    for event in opened:
        await event.wait()
    print("ready", flush=True)
    short = []
    while not stop.is_set():
        if options.every:
            report.attempts.append(Attempt(time.monotonic()))
            short.append(
                asyncio.create_task(attempt(options.address, options.port, report.attempts[-1]))
            )
        try:
            async with asyncio.timeout(options.every or None):
                await stop.wait()
        except TimeoutError:
            continue
    if short:
        await asyncio.wait(short)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("--streams", type=int, default=0)
    parser.add_argument("--direct", type=int, default=0)
    parser.add_argument("--every", type=float, default=0.0)
    json.dump(asdict(asyncio.run(run(parser.parse_args()))), sys.stdout)


if __name__ == "__main__":
    main()
