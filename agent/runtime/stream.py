"""One stream of a tunnel joined to one TCP connection of an app: the relay.

Towards the tunnel, the connection's own task runs `pump`: it reads no more
than the peer's windows and the tunnel's socket let it pass on at once, so it
never holds a byte. Towards the app, the tunnel's reader calls `on_data`,
which writes straight to the app's socket; what the app does not take waits
in `_pending`, at most a stream window of it, and a drain task writes it when
the app reads on. Bytes are credited to the peer only once the app's socket
has them. That is the whole of the backpressure.

A stream ends well when both directions have ended and nothing is pending
(`wait_finished`). It ends badly through `_fail`: the owner's cancel scope is
cancelled, and the owner resets what is left of its side.
"""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING

import trio
from h2.errors import ErrorCodes

from meshbpf.agent.runtime.scratch import READ_BYTES, SCRATCH
from meshbpf.agent.runtime.tasks import guarded
from meshbpf.agent.wire.events import ResponseReceived

if TYPE_CHECKING:
    from meshbpf.agent.runtime.tunnel import Tunnel

log = logging.getLogger(__name__)

_GATHER_LIMIT = 64
"""More pieces than this are joined by copying: the kernel takes 1024 in one call."""


class ByteCount:
    """A number of bytes that grows."""

    __slots__ = ("total",)

    def __init__(self) -> None:
        self.total = 0


class TunnelStream:
    """The stream's state between its owner's task and the tunnel's reader."""

    __slots__ = (
        "_answered",
        "_app",
        "_draining",
        "_finished",
        "_local_ended",
        "_parking",
        "_pending",
        "_remote_ended",
        "_scope",
        "failure",
        "id",
        "response",
        "sent_to_app",
        "taken_from_app",
        "tunnel",
    )

    def __init__(self, tunnel: Tunnel, stream_id: int) -> None:
        self.tunnel = tunnel
        self.id = stream_id
        self.failure = ""
        """Why the stream ended badly; empty while it did not."""
        self.response: ResponseReceived | None = None
        self.sent_to_app = ByteCount()
        self.taken_from_app = ByteCount()
        self._scope: trio.CancelScope | None = None
        self._app: socket.socket | None = None
        self._pending = bytearray()
        self._draining = False
        self._local_ended = False
        self._remote_ended = False
        self._answered = trio.Event()
        self._finished = trio.Event()
        self._parking: trio.lowlevel.ParkingLot | None = None

    # --- the owner's side ---------------------------------------------------

    def bind(
        self, scope: trio.CancelScope, taken_from_app: ByteCount, sent_to_app: ByteCount
    ) -> None:
        """Say what to cancel when the stream fails, and where to count its bytes."""
        self._scope = scope
        self.taken_from_app = taken_from_app
        self.sent_to_app = sent_to_app
        if self.failure:
            scope.cancel()

    async def wait_response(self) -> ResponseReceived | None:
        """The answer to our CONNECT; None when the stream failed before one came."""
        await self._answered.wait()
        return self.response

    async def relay(self, app: socket.socket) -> None:
        """Carry bytes both ways until both directions have ended.

        The socket stays the owner's to close. When the app's side breaks, the
        stream is reset; when the stream does, the bound scope is cancelled.
        """
        self._app = app
        if self._pending or self._remote_ended:
            self._start_drain()
        try:
            await self._pump(app)
        except OSError as error:
            self.app_failed(error)
        await self._finished.wait()

    def app_failed(self, error: OSError) -> None:
        """The TCP connection broke (RFC 9113, section 8.5 names the code)."""
        self._fail(f"the app's connection broke: {error.strerror or error}")
        self.tunnel.reset_stream(self, ErrorCodes.CONNECT_ERROR)

    def abandon(self) -> None:
        """The owner leaves, whatever the state: nothing of the stream stays behind.

        Call before the app's socket is closed.
        """
        if not self.complete:
            self.tunnel.reset_stream(self, ErrorCodes.CANCEL)
        app, self._app = self._app, None
        if app is not None and self._draining:
            trio.lowlevel.notify_closing(app)
        self._discard_pending()

    async def _pump(self, app: socket.socket) -> None:
        """App to tunnel, until the app's FIN."""
        tunnel = self.tunnel
        while True:
            budget = tunnel.send_budget(self)
            if budget <= 0:
                await self._wait_sendable()
                continue
            layout = SCRATCH.layout(tunnel.max_frame_bytes)
            limit = min(budget, layout.capacity)
            try:
                size = app.recvmsg_into(layout.slots(limit))[0]
            except BlockingIOError:
                # It may have been our turn, and we have nothing to say.
                tunnel.pass_turn()
                await trio.lowlevel.wait_readable(app)
                continue
            if not size:
                break
            self.taken_from_app.total += size
            tunnel.send_chunk(self, layout, size)
            if size < limit:
                # The socket is empty, or all but: another try would most
                # likely find nothing.
                await trio.lowlevel.wait_readable(app)
            else:
                await trio.lowlevel.checkpoint()
        self._local_ended = True
        tunnel.end_stream(self)
        self._check_finished()

    async def _wait_sendable(self) -> None:
        if self._parking is None:
            self._parking = trio.lowlevel.ParkingLot()
        await self.tunnel.wait_turn(self, self._parking)

    # --- the tunnel's side --------------------------------------------------

    @property
    def remote_ended(self) -> bool:
        """The peer sends no more."""
        return self._remote_ended

    @property
    def complete(self) -> bool:
        """Both directions have ended, as far as the tunnel is concerned."""
        return self._local_ended and self._remote_ended

    def unpark(self) -> None:
        """More may be sent, perhaps."""
        if self._parking is not None:
            self._parking.unpark()

    def on_response(self, event: ResponseReceived) -> None:
        """The peer answered."""
        self.response = event
        self._answered.set()

    def on_data(self, views: list[memoryview], size: int) -> None:
        """Pass payload on, now if the app takes it, else later."""
        app = self._app
        if self.failure:
            self.tunnel.credit(self, size)
            return
        if app is None or self._pending:
            for view in views:
                self._pending += view
            return
        if len(views) > _GATHER_LIMIT:
            views = [memoryview(b"".join(views))]
        try:
            sent = app.send(views[0]) if len(views) == 1 else app.sendmsg(views)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.app_failed(error)
            self.tunnel.credit(self, size)
            return
        self.sent_to_app.total += sent
        self.tunnel.credit(self, sent)
        if sent < size:
            for view in views:
                if sent < len(view):
                    self._pending += view[sent:]
                    sent = 0
                else:
                    sent -= len(view)
            self._start_drain()

    def on_end(self) -> None:
        """The peer sends no more: the app gets a FIN after what is pending."""
        self._remote_ended = True
        if self._app is not None and not self._pending:
            self._shut_down(self._app)

    def on_reset(self, reason: str) -> None:
        """The stream is gone, or the tunnel with it."""
        self._fail(reason)

    # --- helpers ------------------------------------------------------------

    def _fail(self, reason: str) -> None:
        if self.failure:
            return
        self.failure = reason
        self._answered.set()
        self._discard_pending()
        if self._scope is not None:
            self._scope.cancel()

    def _discard_pending(self) -> None:
        dropped = len(self._pending)
        if dropped:
            self._pending = bytearray()
            self.tunnel.credit(self, dropped)

    def _start_drain(self) -> None:
        if not self._draining:
            self._draining = True
            self.tunnel.nursery.start_soon(guarded, self._drain)

    async def _drain(self) -> None:
        """Write what is pending as the app takes it; then its FIN, if the peer has ended."""
        try:
            while self._pending and (app := self._app) is not None:
                try:
                    with memoryview(self._pending) as pending, pending[:READ_BYTES] as head:
                        sent = app.send(head)
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(app)
                    continue
                del self._pending[:sent]
                self.sent_to_app.total += sent
                self.tunnel.credit(self, sent)
                await trio.lowlevel.checkpoint()
            if self._remote_ended and self._app is not None:
                self._shut_down(self._app)
        except trio.ClosedResourceError:
            log.debug("stream %d: its owner left while it was drained", self.id)
        except OSError as error:
            self.app_failed(error)
        finally:
            self._draining = False

    def _shut_down(self, app: socket.socket) -> None:
        try:
            app.shutdown(socket.SHUT_WR)
        except OSError as error:
            # ENOTCONN: the app reset the connection in the meantime.
            self.app_failed(error)
            return
        self._check_finished()

    def _check_finished(self) -> None:
        if self.complete and not self._pending and not self.failure:
            self._finished.set()
