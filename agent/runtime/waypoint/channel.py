"""Bytes of one connection, whoever carries them: a tunnel's stream, or a TCP socket.

The waypoint reads what is in a stream, where the node agent passes it to an
app's socket. So `MemoryStream` ends a tunnel's stream in this process: what
arrives waits in memory, at most a stream window of it, and is credited to the
peer when somebody takes it. One task receives and one sends, at most.

Waiting is done with trio's own primitives for it and not with Events, of
which each request would need several.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Protocol

import trio
from h2.errors import ErrorCodes
from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.runtime.sockets import hang_up
from meshbpf.agent.runtime.stream import TunnelStream
from meshbpf.agent.runtime.tunnel import Tunnel

_READ_BYTES = 64 * 1024


class BrokenError(MeshbpfError):
    """The connection is gone: reset, or its tunnel has ended."""

    def __init__(self, what: str) -> None:
        super().__init__("connection-broken", what)


class Channel(Protocol):
    """Both directions of one connection."""

    async def receive(self) -> bytes:
        """Some bytes; b"" when the peer sends no more. Raises BrokenError."""
        ...

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send all. Raises BrokenError."""
        ...

    async def send_eof(self) -> None:
        """Send no more; the peer still may. Nothing happens when the connection is gone."""
        ...

    def close(self) -> None:
        """Be done with it, now: reset it unless both directions have ended."""
        ...

    def watch_end(self, callback: Callable[[], None] | None) -> None:
        """Call once when the peer says or ends anything while nobody receives; None: no more."""
        ...

    def watch_broken(self, callback: Callable[[], None] | None) -> None:
        """Call once when the connection breaks, for whoever would find out too late."""
        ...


class Waiter:
    """One task that waits for a thing to happen."""

    __slots__ = ("_task",)

    def __init__(self) -> None:
        self._task: Task | None = None

    async def wait(self) -> None:
        """Sleep until woken, or cancelled."""
        self._task = current_task()
        try:
            await wait_task_rescheduled(self._abort)
        finally:
            self._task = None

    def wake(self) -> bool:
        """Let it go on; False when nobody waits."""
        task, self._task = self._task, None
        if task is None:
            return False
        reschedule(task)
        return True

    def _abort(self, _raise_cancel: object) -> Abort:
        self._task = None
        return Abort.SUCCEEDED


class MemoryStream(TunnelStream):
    """A tunnel's stream that ends here. A `Channel`."""

    __slots__ = ("_mourner", "_receiver", "_sender", "_watcher")

    def __init__(self, tunnel: Tunnel, stream_id: int) -> None:
        super().__init__(tunnel, stream_id)
        self._receiver = Waiter()
        self._sender = Waiter()
        self._watcher: Callable[[], None] | None = None
        self._mourner: Callable[[], None] | None = None

    async def receive(self) -> bytes:
        """See Channel."""
        while not self.pending:
            if self.failure:
                raise BrokenError(self.failure)
            if self._remote_ended:
                return b""
            await self._receiver.wait()
        data = bytes(self.pending)
        self.pending.clear()
        self.tunnel.credit(self, len(data))
        return data

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        """See Channel."""
        tunnel = self.tunnel
        while True:
            if self.failure or self._local_ended:
                tunnel.pass_turn()
                raise BrokenError(self.failure or "this end has been closed")
            budget = min(tunnel.send_budget(self), tunnel.max_frame_bytes)
            if budget >= len(data):
                tunnel.send_bytes(self, data)
                return
            if budget > 0:
                data = memoryview(data)
                tunnel.send_bytes(self, data[:budget])
                data = data[budget:]
                continue
            tunnel.wait_turn(self)
            await self._sender.wait()

    async def send_eof(self) -> None:
        """See Channel."""
        self.end()

    def end(self) -> None:
        """`send_eof`, which never waits here."""
        if not (self.failure or self._local_ended):
            self._local_ended = True
            self.tunnel.end_stream(self)

    def close(self) -> None:
        """See Channel."""
        self._watcher = None
        if self._remote_ended and not self.failure:
            self.end()
        if not (self.complete or self.failure):
            self.tunnel.reset_stream(self, ErrorCodes.CANCEL)
        self._fail("closed by us")

    def watch_end(self, callback: Callable[[], None] | None) -> None:
        """See Channel."""
        self._watcher = callback
        if callback is not None and (self.pending or self._remote_ended or self.failure):
            self._notice()

    def watch_broken(self, callback: Callable[[], None] | None) -> None:
        """See Channel."""
        self._mourner = callback

    # --- the tunnel's side ----------------------------------------------------

    def on_data(self, views: list[memoryview], size: int) -> None:
        """Keep it, and wake who waits."""
        if self.failure:
            self.tunnel.credit(self, size)
            return
        for view in views:
            self.pending += view
        self._notice()

    def on_end(self) -> None:
        """The peer sends no more."""
        self._remote_ended = True
        self._notice()

    def on_reset(self, reason: str) -> None:
        """The stream is gone, or the tunnel with it."""
        # What has arrived before is not worth less for what came after: an
        # answer may be complete, and its sender gone.
        if not self.failure:
            self.failure = reason
            if self._answered is not None:
                self._answered.set()
            if self._scope is not None:
                self._scope.cancel()
            mourner, self._mourner = self._mourner, None
            if mourner is not None:
                mourner()
        self._notice()
        self._sender.wake()

    def resume(self) -> None:
        """More may be sent, perhaps. The sender passes the turn on; without one we do."""
        if not self._sender.wake():
            self.tunnel.pass_turn()

    def _notice(self) -> None:
        self._receiver.wake()
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher()


class SocketChannel:
    """A TCP connection. A `Channel`."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._ended = [False, False]

    async def receive(self) -> bytes:
        """See Channel."""
        try:
            data = bytes(await self._stream.receive_some(_READ_BYTES))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise BrokenError(str(error.__cause__ or error)) from error
        if not data:
            self._ended[0] = True
        return data

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        """See Channel."""
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise BrokenError(str(error.__cause__ or error)) from error

    async def send_eof(self) -> None:
        """See Channel."""
        self._ended[1] = True
        try:
            await self._stream.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return  # it is gone: there is nobody to tell

    def close(self) -> None:
        """See Channel."""
        if self._sock.fileno() != -1:
            # A task may be reading: its wait must not outlive the number, which
            # the next socket gets.
            trio.lowlevel.notify_closing(self._sock)
        hang_up(self._sock, finished=all(self._ended))

    def watch_end(self, callback: Callable[[], None] | None) -> None:
        """See Channel. A socket is asked when it is taken out of its pool: see `idle_ended`."""

    def watch_broken(self, callback: Callable[[], None] | None) -> None:
        """See Channel. Sockets lead to endpoints, which somebody always reads from."""

    def idle_ended(self) -> bool:
        """Whether the peer has closed it, or said something that nobody asked for."""
        try:
            self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True
