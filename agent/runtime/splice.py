"""Carries a TCP connection that passes the agent unchanged, without touching its bytes.

splice(2) moves pages between a socket and a pipe inside the kernel; it needs
a pipe between two sockets. Facts the code relies on:

- With SPLICE_F_NONBLOCK a splice from a socket returns what is there, 0 at
  the peer's FIN, EAGAIN when nothing is there; towards a socket, EAGAIN when
  its buffer is full. EAGAIN does not say which side it was, so the pipe is
  always emptied before it is filled again.
- A pipe holds 64 KiB unless it is told otherwise; a user may own only so
  many pages in pipes above that (pipe-user-pages-soft), which root is exempt
  from. Failing to enlarge one is no error.

A pipe costs two descriptors, so a direction gets its pipe with its first
byte and holds it until its FIN.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket

import trio

from meshbpf.agent.runtime.stream import ByteCount

_PIPE_BYTES = 256 * 1024
_F_SETPIPE_SZ = 1031  # linux/fcntl.h
_FLAGS = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE


async def splice_both(
    client: socket.socket, upstream: socket.socket, sent: ByteCount, received: ByteCount
) -> None:
    """Carry bytes both ways until both directions have ended; half-closes are kept.

    Raises OSError when either side breaks. The sockets stay the caller's.
    """
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_splice, client, upstream, sent)
            await _splice(upstream, client, received)
    except BaseExceptionGroup as group:
        broken, rest = group.split(OSError)
        if broken is None or rest is not None:
            raise
        raise _only(broken) from None


async def _splice(source: socket.socket, sink: socket.socket, count: ByteCount) -> None:
    await trio.lowlevel.wait_readable(source)
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        with contextlib.suppress(PermissionError):  # 64 KiB does it too, in more calls
            fcntl.fcntl(writer, _F_SETPIPE_SZ, _PIPE_BYTES)
        while True:
            try:
                inside = os.splice(source.fileno(), writer, _PIPE_BYTES, flags=_FLAGS)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(source)
                continue
            if not inside:
                break
            count.total += inside
            while inside:
                try:
                    inside -= os.splice(reader, sink.fileno(), inside, flags=_FLAGS)
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(sink)
            await trio.lowlevel.checkpoint()
    finally:
        os.close(reader)
        os.close(writer)
    sink.shutdown(socket.SHUT_WR)


def _only(errors: ExceptionGroup[OSError]) -> OSError:
    """One of a group: when a connection breaks, both directions report it."""
    for error in errors.exceptions:
        return error if isinstance(error, OSError) else _only(error)
    raise AssertionError("an exception group is never empty")
