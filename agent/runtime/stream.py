"""One stream of a tunnel joined to one TCP connection of an app: the relay.

No task moves bytes; the reactor's callbacks do. Towards the tunnel, `_pump`
reads no more than the peer's windows and the tunnel's socket let it pass on
at once, so it never holds a byte. Towards the app, the tunnel calls `on_data`,
which writes straight to the app's socket; what the app does not take waits
in `pending`, at most a stream window of it, until the socket is writable
again. Bytes are credited to the peer only once the app's socket has them.
That is the whole of the backpressure.

The owner's task sleeps in `relay` meanwhile. A stream ends well when both
directions have ended and nothing is pending. It ends badly through `_fail`:
the owner's cancel scope is cancelled, and the owner resets what is left of
its side.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio
from h2.errors import ErrorCodes

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.runtime import reactor
from meshbpf.agent.runtime.scratch import READ_BYTES, SCRATCH
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
        "_app_ended",
        "_finished",
        "_local_ended",
        "_postponed",
        "_reactor",
        "_readable",
        "_remote_ended",
        "_scope",
        "_watching",
        "failure",
        "id",
        "pending",
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
        self._reactor = tunnel.reactor
        self._readable = False
        """The app's socket may have something to read."""
        self._app_ended = False
        """It has its end, or an error, to read: a short read is not the last."""
        self._watching = False
        """The reactor calls for writability too."""
        self.pending = bytearray()
        """What the app did not take yet."""
        self._local_ended = False
        self._remote_ended = False
        self._postponed = ""
        """Why it has gone, while the app has not got what came before that."""
        self._answered: trio.Event | None = None
        self._finished: trio.Event | None = None

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
        if self.response is None and not self.failure:
            self._answered = trio.Event()
            await self._answered.wait()
        return self.response

    async def relay(self, app: socket.socket) -> None:
        """Carry bytes both ways until both directions have ended.

        The socket stays the owner's to close. When the app's side breaks, the
        stream is reset; when the stream does, the bound scope is cancelled.
        """
        self._app = app
        self._finished = trio.Event()
        self.tunnel.accelerate(self, app)
        self._reactor.add(app.fileno(), self._on_app)
        if self.pending or self._remote_ended:
            self._guarded(self._drain)
        await self._finished.wait()

    def give_up(self, reason: str) -> None:
        """Reset the stream, and have its owner reset the app's connection."""
        self._fail(reason)
        self.tunnel.reset_stream(self, ErrorCodes.ENHANCE_YOUR_CALM)

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
        if app is not None:
            self._reactor.remove(app.fileno())
        self._discard_pending()

    # --- the reactor's side -------------------------------------------------

    def _on_app(self, flags: int) -> None:
        """Something happened to the app's socket."""
        if self.pending and flags & reactor.WRITABLE:
            self._guarded(self._drain)
        if flags & reactor.READABLE:
            self._readable = True
            if flags & reactor.ENDED:
                self._app_ended = True
            self._guarded(self._pump)
        if flags & reactor.BROKEN:
            self._guarded(self._raise_broken)

    def resume(self) -> None:
        """More may be sent, perhaps."""
        self._reactor.again(self._turn)

    def _turn(self) -> None:
        self._guarded(self._pump)

    def _guarded(self, work: Callable[[], None]) -> None:
        """Do something for this stream whose failure concerns no other."""
        try:
            work()
        except OSError as error:
            self.app_failed(error)
        except MeshbpfError as error:
            self._fail(error.what)
        except Exception as error:  # boundary: a bug costs one connection, and is seen
            log.exception("stream %d: %s", self.id, error)
            self._fail("internal error")

    def _raise_broken(self) -> None:
        """Notice a reset also where no read will meet it, or not before a window opens."""
        app = self._app
        if app is None or self.failure:
            return
        if self._local_ended or self.tunnel.send_budget(self) <= 0:
            fault = app.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if fault:
                raise OSError(fault, os.strerror(fault))

    def _pump(self) -> None:
        """App to tunnel: one chunk, or what there is."""
        tunnel = self.tunnel
        while self._readable and not (self._local_ended or self.failure):
            app = self._app
            if app is None:
                break
            budget = tunnel.send_budget(self)
            if budget <= 0:
                tunnel.wait_turn(self)
                return
            layout = SCRATCH.layout(tunnel.max_frame_bytes)
            limit = min(budget, layout.capacity)
            try:
                slots = layout.slots(limit)
                size = app.recv_into(slots[0]) if len(slots) == 1 else app.recvmsg_into(slots)[0]
            except BlockingIOError:
                self._readable = False
                break
            if not size:
                self._local_ended = True
                tunnel.end_stream(self)
                self._check_finished()
                return
            self.taken_from_app.total += size
            tunnel.send_chunk(self, layout, size)
            if size == limit:
                # There is more, most likely: others first.
                self.resume()
                return
            # The socket is empty, unless its end has come: another try would
            # most likely find nothing.
            self._readable = self._app_ended
        # It may have been our turn, and we have nothing to say.
        tunnel.pass_turn()

    # --- the tunnel's side --------------------------------------------------

    @property
    def remote_ended(self) -> bool:
        """The peer sends no more."""
        return self._remote_ended

    @property
    def complete(self) -> bool:
        """Both directions have ended, as far as the tunnel is concerned."""
        return self._local_ended and self._remote_ended

    def on_response(self, event: ResponseReceived) -> None:
        """The peer answered."""
        self.response = event
        if self._answered is not None:
            self._answered.set()

    def on_data(self, views: list[memoryview], size: int) -> None:
        """Pass payload on, now if the app takes it, else later."""
        app = self._app
        if self.failure:
            self.tunnel.credit(self, size)
            return
        if app is None or self.pending:
            for view in views:
                self.pending += view
            return
        if len(views) > _GATHER_LIMIT:
            views = [memoryview(b"".join(views))]
        try:
            sent = app.send(views[0]) if len(views) == 1 else app.sendmsg(views)
        except BlockingIOError:
            self.settle(views, size, 0, None)
        except OSError as error:
            self.settle(views, size, 0, error)
        else:
            self.settle(views, size, sent, None)

    def settle(self, views: list[memoryview], size: int, sent: int, error: OSError | None) -> None:
        """Account for an attempt to write `views` to the app: `sent` of `size` bytes went."""
        app = self._app
        if error is not None or app is None:
            if error is not None:
                self.app_failed(error)
            self.tunnel.credit(self, size)
            return
        self.sent_to_app.total += sent
        self.tunnel.credit(self, sent)
        if sent < size:
            for view in views:
                if sent < len(view):
                    self.pending += view[sent:]
                    sent = 0
                else:
                    sent -= len(view)
            self._watch_writable(app)

    def on_end(self) -> None:
        """The peer sends no more: the app gets a FIN after what is pending."""
        self._remote_ended = True
        if self._app is not None and not self.pending:
            self._shut_down(self._app)

    def on_reset(self, reason: str) -> None:
        """The stream is gone, or the tunnel with it.

        An answer that came with it is the app's all the same, as data before an
        RST is: nobody has had the time to begin with `relay`.
        """
        if self._app is None and self.response is not None and self.pending:
            self._postponed = reason
            self._local_ended = True
        else:
            self._fail(reason)

    def native_failed(self, error: BaseException) -> None:
        """The engine met a bug of ours: it costs one connection, and is seen."""
        log.error("stream %d: %s", self.id, error, exc_info=error)
        self._fail("internal error")

    # --- helpers ------------------------------------------------------------

    def _fail(self, reason: str) -> None:
        if self.failure:
            return
        self.failure = reason
        if self._answered is not None:
            self._answered.set()
        self._discard_pending()
        if self._scope is not None:
            self._scope.cancel()

    def _discard_pending(self) -> None:
        dropped = len(self.pending)
        if dropped:
            self.pending = bytearray()
            self.tunnel.credit(self, dropped)

    def _watch_writable(self, app: socket.socket) -> None:
        if not self._watching:
            self._watching = True
            self._reactor.watch_writable(app.fileno())

    def _drain(self) -> None:
        """Write what is pending as far as the app takes it; then its FIN, if the peer has ended."""
        app = self._app
        if app is None:
            return
        while self.pending:
            try:
                with memoryview(self.pending) as pending, pending[:READ_BYTES] as head:
                    sent = app.send(head)
            except BlockingIOError:
                self._watch_writable(app)
                return
            del self.pending[:sent]
            self.sent_to_app.total += sent
            self.tunnel.credit(self, sent)
        if self._remote_ended:
            self._shut_down(app)
        elif self._postponed:
            self._fail(self._postponed)

    def _shut_down(self, app: socket.socket) -> None:
        if self.complete:
            # The owner closes it now, which says the same.
            self._check_finished()
            return
        try:
            app.shutdown(socket.SHUT_WR)
        except OSError as error:
            # ENOTCONN: the app reset the connection in the meantime.
            self.app_failed(error)
            return
        self._check_finished()

    def _check_finished(self) -> None:
        if self.complete and not self.pending and not self.failure and self._finished is not None:
            self._finished.set()
