"""One tunnel: a TCP socket, TLS over it, HTTP/2 in that.

The reactor calls when the socket is readable: large pieces are taken from it,
and everything in them is acted on. Whoever sends writes to the socket at
once; only what the kernel does not take waits in the backlog until the socket
is writable again, and while there is a backlog no stream reads from its app. So at most one chunk
and some control frames wait for a socket, however many streams there are.

Streams outlive the tunnel only to drain: one that both sides have ended may
still have bytes for a slow app.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import ParamSpec

import trio
from h2.errors import ErrorCodes

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.tuning import ZTUNNELS, Tuning
from meshbpf.agent.runtime import native, reactor
from meshbpf.agent.runtime.farewell import Farewell
from meshbpf.agent.runtime.scratch import SCRATCH, Layout
from meshbpf.agent.runtime.stream import TunnelStream
from meshbpf.agent.runtime.tunnel_parts import TunnelParts, TunnelStatistics, reset_reason
from meshbpf.agent.runtime.turns import Turns
from meshbpf.agent.wire.errors import PeerError, TlsError, WireError
from meshbpf.agent.wire.events import (
    DataReceived,
    Event,
    GoAwayReceived,
    Headers,
    RequestReceived,
    ResponseReceived,
    SendWindowOpened,
    StreamEnded,
    StreamReset,
)
from meshbpf.agent.wire.frames import HEADER_BYTES
from meshbpf.agent.wire.hbone import HboneConnection
from meshbpf.agent.wire.tls_channel import TlsChannel

log = logging.getLogger(__name__)

P = ParamSpec("P")
Early = Callable[[int], bytes]
"""What is to be sent with a CONNECT, at most so many bytes."""

PING_INTERVAL_S = 10.0
PING_TIMEOUT_S = 20.0
SMALL_BYTES = 16 * 1024
"""A chunk up to this waits for others of the same round, to leave with one send."""
BACKLOG_LIMIT_BYTES = 4 * 1024 * 1024
"""Only a peer that makes us answer and never reads gets here."""


class Tunnel:
    """A connected tunnel. `run` serves it; until then nothing is read."""

    def __init__(
        self,
        sock: socket.socket,
        channel: TlsChannel,
        nursery: trio.Nursery,
        *,
        server: bool,
        on_request: Callable[[Tunnel, RequestReceived, TunnelStream], None] | None = None,
        on_unusable: Callable[[Tunnel], None] | None = None,
        stream_type: type[TunnelStream] = TunnelStream,
        tuning: Tuning = ZTUNNELS,
    ) -> None:
        self._stream_type = stream_type
        self.nursery = nursery
        """Where stream handlers run: it outlives the tunnel."""
        self.reactor = reactor.current()
        self.pooled = False
        """New streams may come from the pool; else the tunnel ends with its last stream."""
        self.closed = False
        self._sock = sock
        self._channel = channel
        self._server = server
        self._wire = HboneConnection(server=server, tuning=tuning)
        self._on_request = on_request
        self._on_unusable = on_unusable
        self._streams: dict[int, TunnelStream] = {}
        self._backlog: deque[memoryview] = deque()
        self._backlog_bytes = 0
        self._turns = Turns(self._backlog)
        self._scope = trio.CancelScope()
        self._spoke_in = 0
        """The reactor's round in which HEADERS left at once."""
        self.fault: WireError | OSError | None = None
        """What ended the tunnel, if it was not in order."""
        self._transmitting = False
        """`_transmit_all` will be called at the end of this round."""
        self._ending = False
        self._farewell = Farewell(sock, self._backlog, self._scope, self._say_goodbye)
        self._sock_ended = False
        """The socket has its end, or an error, to read: a short read is not the last."""
        self._heard = True
        """Something was received since the last PING was sent."""
        self._idle_since: float | None = None
        self._idle_limit_s = tuning.tunnel_idle_s
        self._fast: dict[int, native.Handle] = {}
        """The engine's handles of open streams."""
        self.handle: native.Handle | None = None

    # --- for the pool and the owners ----------------------------------------

    @property
    def peer(self) -> SpiffeId:
        """Who the other end proved to be."""
        return self._channel.peer

    @property
    def usable(self) -> bool:
        """Whether a stream can be opened."""
        return not (self.closed or self._farewell.parting or self._wire.going_away)

    @property
    def stream_count(self) -> int:
        """Open streams."""
        return len(self._streams)

    @property
    def max_streams(self) -> int:
        """The peer's limit."""
        return self._wire.max_streams

    @property
    def idle_since(self) -> float | None:
        """When the last stream ended, in trio time; None while there is one."""
        return self._idle_since

    def statistics(self) -> TunnelStatistics:
        """For `status`."""
        return TunnelStatistics(
            streams=len(self._streams),
            backlog_bytes=self._backlog_bytes,
            pooled=self.pooled,
            going_away=self._wire.going_away,
        )

    def start(self) -> None:
        """Queue our preface and SETTINGS."""
        self._wire.start()
        self._transmit_soon()

    def open(self, headers: Headers, early: Early | None = None) -> TunnelStream:
        """Ask the peer for a stream. Raises WireError when the tunnel takes none.

        What `early` returns goes with the question (RFC 9113, section 8.5); it is
        asked once, with how many bytes there is room for. What it raises is raised.
        """
        stream_id = self._wire.open(headers)
        stream = self._stream_type(self, stream_id)
        self._streams[stream_id] = stream
        self._idle_since = None
        if early is not None:
            room = min(self.send_budget(stream), self.max_frame_bytes)
            try:
                data = early(max(room, 0))
            except (MeshbpfError, OSError):
                self.reset_stream(stream, ErrorCodes.CANCEL)
                raise
            if data:
                self._wire.send_data(stream_id, data)
        self._send_headers()
        return stream

    def respond(self, stream: TunnelStream, headers: Headers, *, end_stream: bool) -> bool:
        """Answer a request; False when the stream has gone."""
        answered = self._wire.respond(stream.id, headers, end_stream=end_stream)
        self._send_headers()
        if end_stream:
            self._drop(stream)
        return answered

    def release(self) -> None:
        """The pool hands out no more streams: end with the last one."""
        self.pooled = False
        if not self._streams:
            self._farewell.part("it was idle")

    def drain(self) -> None:
        """Take no more streams and end with the last one; clients learn it by GOAWAY."""
        if self.closed or self._ending or self._farewell.draining:
            return
        self._farewell.draining = True
        if self._server:
            self._wire.wind_down(os.urandom(8))
            self._transmit_soon()
        else:
            self._leave_pool()

    def close(self, reason: str) -> None:
        """End the tunnel now; `run` says goodbye and returns."""
        self._farewell.reason = reason
        self._ending = True
        self._scope.cancel()

    # --- for the relay in C ---------------------------------------------------

    def parts(self) -> TunnelParts:
        """What it works on."""
        return TunnelParts(
            self._channel.addresses(), self._wire, self._turns.waiting, self._backlog, self._fast
        )

    def accelerate(self, stream: TunnelStream, app: socket.socket) -> None:
        """Let the engine carry the usual bytes of an open stream, if there is an engine."""
        if self.handle is not None and not self.closed:
            windows = self._wire.stream_windows(stream.id)
            if windows is not None:
                handle = native.stream_handle(stream, self.handle, app, windows)
                self._fast[stream.id] = handle
                self.reactor.accelerate(handle)

    def act(self, plaintext: memoryview) -> None:
        """Act on received plaintext that the engine left to us."""
        self._guarded(self._act, plaintext)

    def peer_ended(self, stream_id: int) -> None:
        """The engine read the last DATA of a stream."""
        self._guarded(self._peer_ended, stream_id)

    def tls_failed(self, result: int) -> None:
        """An OpenSSL function returned `result` to the engine."""
        self._guarded(self._channel.failed, result)

    def broken(self, error: OSError) -> None:
        """The socket returned an error to the engine."""
        if not self._ending:
            self._end(error)

    def native_failed(self, error: BaseException) -> None:
        """The engine met a bug of ours: it costs one tunnel, and is seen."""
        log.error("tunnel with %s: %s", self._peer_name(), error, exc_info=error)
        self.close("internal error")

    def _accelerate(self) -> None:
        engine = self.reactor.engine
        if engine is not None:
            self.handle = native.tunnel_handle(self, engine, self._sock)
            if self.handle is not None:
                self.reactor.accelerate(self.handle)

    # --- for streams --------------------------------------------------------

    @property
    def max_frame_bytes(self) -> int:
        """The longest DATA payload that the peer takes."""
        return self._wire.max_frame_bytes

    def send_budget(self, stream: TunnelStream) -> int:
        """How much the stream may send now: 0 while the socket is behind."""
        return 0 if self._backlog else self._wire.send_budget(stream.id)

    def send_chunk(self, stream: TunnelStream, layout: Layout, size: int) -> None:
        """Send `size` bytes that were read into `layout`; at most `send_budget`."""
        wire, stream_id = self._wire, stream.id
        if wire.out:
            self._encrypt_control()
        if size <= layout.payload_bytes:
            wire.write_data_header(layout.buffer, 0, stream_id, size)
            self._channel.write(layout.view[: HEADER_BYTES + size])
        else:
            self._channel.write(
                layout.frame(
                    size,
                    lambda buffer, at, length: wire.write_data_header(
                        buffer, at, stream_id, length
                    ),
                )
            )
        if size > SMALL_BYTES:
            self._transmit()
        else:
            self._transmit_soon()
        self.pass_turn()

    def send_bytes(self, stream: TunnelStream, payload: bytes | bytearray | memoryview) -> None:
        """Send what is in memory already: at most `send_budget`, at most `max_frame_bytes`.

        It leaves with all else that is said in this round.
        """
        self._wire.send_data(stream.id, payload)
        self._transmit_soon()
        self.pass_turn()

    def wait_turn(self, stream: TunnelStream) -> None:
        """Have the stream resumed when `send_budget` may have risen."""
        self._turns.wait(stream)

    def credit(self, stream: TunnelStream, size: int) -> None:
        """`size` received bytes of the stream have left for good."""
        if size and not self.closed:
            self._wire.credit(stream.id, size)
            if self._wire.out:
                self._transmit_soon()

    def end_stream(self, stream: TunnelStream) -> None:
        """Our direction is over."""
        if not self.closed:
            self._wire.end(stream.id)
            self._transmit_soon()
            self.pass_turn()
        if stream.complete:
            self._drop(stream)

    def reset_stream(self, stream: TunnelStream, error_code: ErrorCodes) -> None:
        """End the stream in both directions, if it is not already over."""
        if not self.closed:
            self._wire.reset(stream.id, error_code)
            self._transmit_soon()
            self.pass_turn()
        self._drop(stream)

    # --- life ---------------------------------------------------------------

    async def run(self) -> None:
        """Serve the tunnel until either side ends it. Cancelled: says GOAWAY and closes."""
        try:
            with self._scope, self._channel.watched(self._end):
                # What followed the handshake in the same segment is here already.
                self._guarded(self._process)
                self._accelerate()
                self.reactor.add(self._sock.fileno(), self._on_socket, writing=True)
                await self._keep_alive()
            code = ErrorCodes.NO_ERROR
            if self.fault is not None:
                self._farewell.reason = str(self.fault)
                log.info("tunnel with %s ended: %s", self._peer_name(), self.fault)
                if isinstance(self.fault, PeerError):
                    code = self.fault.error_code
            self._say_goodbye(code)
        except trio.Cancelled:
            self._farewell.reason = "the agent is shutting down"
            self._say_goodbye()
            raise
        finally:
            self._finish()

    def _finish(self) -> None:
        self.closed = self._ending = True
        if self._on_unusable is not None:
            self._on_unusable(self)
        self.reactor.remove(self._sock.fileno())
        self.handle = None
        self._fast.clear()
        self._sock.close()
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.on_reset(self._farewell.reason)
        self._turns.clear()

    def _on_socket(self, flags: int) -> None:
        """Something happened to the socket."""
        if self._backlog and flags & reactor.WRITABLE:
            self._guarded(self._flush)
        if flags & reactor.READABLE:
            if flags & reactor.ENDED:
                self._sock_ended = True
            self._guarded(self._read)

    def _guarded(self, work: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Do something whose failure ends the tunnel. Once is enough."""
        if self._ending:
            return
        try:
            work(*args, **kwargs)
        except (WireError, OSError) as error:
            self._end(error)
        except Exception as error:  # boundary: a bug costs one tunnel, and is seen
            log.exception("tunnel with %s: %s", self._peer_name(), error)
            self.close("internal error")

    def _end(self, fault: WireError | OSError) -> None:
        self.fault = fault
        self._ending = True
        self._scope.cancel()

    def _turn_to_read(self) -> None:
        self._guarded(self._read)

    def _read(self) -> None:
        """Take one piece from the socket; another turn when there may be more."""
        ciphertext = SCRATCH.ciphertext
        try:
            size = self._sock.recv_into(ciphertext)
        except BlockingIOError:
            return
        if not size:
            self.close("the peer closed the tunnel")
            return
        self._heard = True
        self._channel.receive(ciphertext[:size])
        self._process()
        if size == len(ciphertext) or self._sock_ended:
            self.reactor.again(self._turn_to_read)

    def _process(self) -> None:
        """Decrypt and act on all that has been received."""
        plaintext = SCRATCH.plaintext
        while size := self._channel.read_into(plaintext):
            self._act(plaintext[:size])
            if size < len(plaintext):
                break
        # What TLS itself may have to say (a key update) goes with our next word.
        if self._wire.out:
            self._transmit_soon()

    def _act(self, plaintext: memoryview) -> None:
        for event in self._wire.receive(plaintext):
            self._on_event(event)
        self._linger_if_drained()

    def _linger_if_drained(self) -> None:
        if self._farewell.draining and not self._streams and self._wire.going_away:
            self._farewell.linger()

    def _peer_ended(self, stream_id: int) -> None:
        for event in self._wire.peer_ended(stream_id):
            self._on_event(event)

    def _on_event(self, event: Event) -> None:
        match event:
            case DataReceived(stream_id, views, size):
                stream = self._streams.get(stream_id)
                if stream is not None:
                    stream.on_data(views, size)
                else:
                    self._wire.credit(stream_id, size)
            case SendWindowOpened(0):
                self._turns.window_opened(None)
            case SendWindowOpened(stream_id):
                if (stream := self._streams.get(stream_id)) is not None:
                    self._turns.window_opened((stream,))
            case RequestReceived(stream_id):
                stream = self._stream_type(self, stream_id)
                self._streams[stream_id] = stream
                if self._on_request is not None:
                    self._on_request(self, event, stream)
            case ResponseReceived(stream_id):
                if (stream := self._streams.get(stream_id)) is not None:
                    stream.on_response(event)
            case StreamEnded(stream_id):
                if (stream := self._streams.get(stream_id)) is not None:
                    stream.on_end()
                    if stream.complete:
                        self._drop(stream)
            case StreamReset(stream_id, error_code, by_peer):
                if (stream := self._streams.get(stream_id)) is not None:
                    self._drop(stream)
                    stream.on_reset(reset_reason(error_code, by_peer))
            case GoAwayReceived():
                if not self._server:
                    self._leave_pool()
            case _:
                pass  # SETTINGS are in the wire's attributes; a PING's answer is in _heard

    def _drop(self, stream: TunnelStream) -> None:
        self._fast.pop(stream.id, None)
        self._turns.forget(stream)
        if self._streams.pop(stream.id, None) is not None and not self._streams:
            self._idle_since = trio.current_time()
            if self._server:
                self._linger_if_drained()
            elif not (self.pooled or self.closed):
                self._farewell.part("its last stream ended")

    # --- sending ------------------------------------------------------------

    def _encrypt_control(self) -> None:
        self._channel.write(self._wire.out)
        self._wire.out.clear()

    def _send_headers(self) -> None:
        """Send a question or an answer: the first of a round at once, others with what comes.

        Else both ends of a busy tunnel would take turns, each waiting while the
        other works through a round; at once for all would cost a send for each.
        """
        engine = self.reactor.engine
        if self.handle is not None and engine is not None and self._spoke_in != self.reactor.rounds:
            self._spoke_in = self.reactor.rounds
            engine.flush(self.handle)
        else:
            self._transmit_soon()

    def _transmit_soon(self) -> None:
        """Send what the wire has to say, with what others have to say in this round."""
        if self.handle is not None and self.reactor.engine is not None:
            self.reactor.engine.flush_soon(self.handle)
        elif not self._transmitting:
            self._transmitting = True
            self.reactor.before_waiting(self._transmit_all)

    def _transmit_all(self) -> None:
        self._transmitting = False
        if not self.closed:
            self._guarded(self._transmit_now)

    def _transmit_now(self) -> None:
        if self._farewell.said:
            self._wire.out.clear()
        if self._wire.out:
            self._encrypt_control()
        self._transmit()

    def _transmit(self) -> None:
        """Send what TLS has ready; keep what the socket does not take."""
        buffer = SCRATCH.outgoing
        while size := self._channel.take_into(buffer):
            if self.closed:
                return
            sent = 0
            if not self._backlog:
                try:
                    sent = self._sock.send(buffer[:size])
                except BlockingIOError:
                    sent = 0
                except OSError as error:
                    # The reader ends the tunnel: it may be deep in a call of ours.
                    self.close(f"sending failed: {error.strerror}")
                    return
            if sent < size:
                self._queue(bytes(buffer[sent:size]))
            if size < len(buffer):
                return

    def _queue(self, ciphertext: bytes) -> None:
        self._backlog.append(memoryview(ciphertext))
        self._backlog_bytes += len(ciphertext)
        if self._backlog_bytes > BACKLOG_LIMIT_BYTES:
            self.close("the peer reads nothing of what it asks for")

    def _flush(self) -> None:
        sock, backlog = self._sock, self._backlog
        while backlog:
            try:
                sent = sock.send(backlog[0])
            except BlockingIOError:
                return
            self._backlog_bytes -= sent
            if sent == len(backlog[0]):
                backlog.popleft()
            else:
                backlog[0] = backlog[0][sent:]
        self._farewell.flushed()
        self.pass_turn()

    def pass_turn(self) -> None:
        """Let the next stream send, if the socket is free: see Turns."""
        self._turns.pass_on()

    async def _keep_alive(self) -> None:
        """PING when nothing else was heard; end a tunnel that is dead, or idle for long."""
        silent_s = 0.0
        while True:
            await trio.sleep(PING_INTERVAL_S)
            silent_s = 0.0 if self._heard else silent_s + PING_INTERVAL_S
            if silent_s >= PING_TIMEOUT_S:
                self._end(TlsError("ping-timeout", f"no answer to PING in {PING_TIMEOUT_S:.0f} s"))
                return
            idle = self._idle_since
            if self.pooled and idle is not None and trio.current_time() - idle > self._idle_limit_s:
                self._leave_pool()
                return
            self._heard = False
            self._wire.new_period()
            self._wire.ping(os.urandom(8))
            self._transmit_soon()

    def _leave_pool(self) -> None:
        if self._on_unusable is not None:
            self._on_unusable(self)
        self.release()

    def _say_goodbye(self, error_code: ErrorCodes = ErrorCodes.NO_ERROR) -> None:
        """GOAWAY and close_notify, as far as the socket takes them without waiting."""
        if self._farewell.said:
            return
        try:
            self._wire.go_away(error_code)
            self._transmit_now()
            self._channel.close()
            self._transmit()
        except MeshbpfError as error:
            log.debug("no goodbye to %s: %s", self._peer_name(), error)

    def _peer_name(self) -> str:
        return str(self._channel.peer)
