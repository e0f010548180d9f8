"""An HBONE connection without I/O: bytes in, events out; calls in, bytes out.

Who owns what:

| frames | owner |
|---|---|
| SETTINGS, PING | the h2 library (h2state.py) |
| what is in a header block | hpack_in.py, hpack_out.py |
| all others, the states of streams, both windows | this file |

Rules that hold throughout:
1. `receive` takes any cut of the byte stream and returns events in order.
2. What is to be sent gathers in `out`, but for DATA: its header is written
   straight into the caller's buffer, in front of the payload, and the caller
   sends `out` first.
3. A fault of the whole connection raises PeerError, once; send `go_away` and
   close. A fault of one stream resets that stream and is an event.
4. Received bytes are credited to the peer by `credit` alone, after they have
   left for good, also when their stream has gone in the meantime.
"""

from __future__ import annotations

from collections.abc import Iterator

import h2.events
from h2.errors import ErrorCodes
from h2.settings import SettingCodes

from meshbpf.agent.core.tuning import ZTUNNELS, Tuning
from meshbpf.agent.wire.errors import PeerError, UsageError
from meshbpf.agent.wire.events import (
    DataReceived,
    Event,
    GoAwayReceived,
    Headers,
    PingAnswered,
    RequestReceived,
    ResponseReceived,
    SendWindowOpened,
    SettingsReceived,
    StreamEnded,
    StreamReset,
)
from meshbpf.agent.wire.frames import (
    FLAG_END_HEADERS,
    FLAG_END_STREAM,
    FLAG_PADDED,
    FLAG_PRIORITY,
    HEADER_BYTES,
    Data,
    Frame,
    FrameSplitter,
    FrameType,
    header,
    write_header,
)
from meshbpf.agent.wire.h2state import MAX_FRAME_BYTES, SERVER_MAX_STREAMS, H2State
from meshbpf.agent.wire.headers import read_request, read_status
from meshbpf.agent.wire.hpack_out import LiteralEncoder
from meshbpf.agent.wire.windows import (
    DEFAULT_WINDOW_BYTES,
    ReceiveWindow,
    SendWindow,
    WindowOverflowError,
)

EARLY_RESET_LIMIT = 1000
"""Streams that a client may reset unanswered, beyond those that it lets be answered."""
CONTROL_FRAME_LIMIT = 1000
"""SETTINGS, PING and frames without use that a peer may send between two `new_period`.

Each costs it nothing and us an answer, or at least a look (CVE-2019-9512, -9515, -9518).
"""
CONTINUATION_LIMIT = 63
"""Of one header block; beyond its length, since they may be empty."""
_DEFAULT_MAX_FRAME_BYTES = 16384
_NO_STREAM_LIMIT = 2**31 - 1
_HIGHEST_STREAM_ID = 2**31 - 1
_CUT_REMEMBERED = 256
_PRIORITY_BYTES = 5
_FIRST_FINAL_STATUS = 200
_PRODUCTIVE = frozenset(
    {FrameType.HEADERS, FrameType.CONTINUATION, FrameType.WINDOW_UPDATE, FrameType.RST_STREAM}
)
"""Frames that carry a tunnel's work, or have a limit of their own."""


class _Stream:
    __slots__ = ("answered", "local_ended", "receive", "remote_ended", "send")

    def __init__(self, send_window: int, receive_window: int) -> None:
        self.send = SendWindow(send_window)
        self.receive = ReceiveWindow(receive_window)
        self.answered = False
        """Server: we answered. Client: the peer did."""
        self.local_ended = False
        self.remote_ended = False


class HboneConnection:
    """Either end of a tunnel."""

    def __init__(self, *, server: bool, tuning: Tuning = ZTUNNELS) -> None:
        self._server = server
        self._tuning = tuning
        self._stream_window = tuning.stream_window_bytes
        self._h2 = H2State(server=server, stream_window_bytes=tuning.stream_window_bytes)
        self._encoder = LiteralEncoder()
        self.splitter = FrameSplitter(server=server, max_frame_bytes=MAX_FRAME_BYTES)
        self._streams: dict[int, _Stream] = {}
        self.send_window = self._send = SendWindow(DEFAULT_WINDOW_BYTES)
        self.receive_window = self._receive = ReceiveWindow(tuning.tunnel_window_bytes)
        self._peer_initial_window = DEFAULT_WINDOW_BYTES
        self._next_stream_id = 1
        self._highest_seen = 0
        """The highest stream id that either side has opened."""
        self._early_resets = 0
        self._control_frames = 0
        self._cut: dict[int, None] = {}
        """The streams that we reset last: frames of theirs may be on their way."""
        self._block: Frame | None = None
        """The HEADERS whose CONTINUATIONs come, with what has come of them."""
        self._continuations = 0
        self.max_frame_bytes = _DEFAULT_MAX_FRAME_BYTES
        """The longest DATA payload that the peer takes."""
        self.max_streams = _NO_STREAM_LIMIT
        """The peer's limit on streams that we open."""
        self.going_away = False
        """Either side has said GOAWAY: no new streams."""
        self._last_words = b""
        """The PING whose answer ends `wind_down`; empty before."""
        self.out = bytearray()
        """What is to be sent next. The driver empties it."""

    # --- calls ------------------------------------------------------------

    def start(self) -> None:
        """Begin: preface, SETTINGS, and the connection window beyond its default."""
        self._h2.initiate_connection()
        self._take_h2_output()
        self._window_update(0, self._tuning.tunnel_window_bytes - DEFAULT_WINDOW_BYTES)

    @property
    def stream_count(self) -> int:
        """Streams that are open in either direction."""
        return len(self._streams)

    def open(self, headers: Headers) -> int:
        """Client: ask for a stream; its id. The answer comes as ResponseReceived."""
        if self.going_away:
            raise UsageError("no stream can be opened after GOAWAY")
        stream_id = self._next_stream_id
        if stream_id > _HIGHEST_STREAM_ID:
            raise UsageError("the stream ids of this tunnel are used up")
        self._send_headers(stream_id, headers, end_stream=False)
        self._next_stream_id += 2
        self._highest_seen = stream_id
        self._streams[stream_id] = _Stream(self._peer_initial_window, self._stream_window)
        return stream_id

    def respond(self, stream_id: int, headers: Headers, *, end_stream: bool) -> bool:
        """Server: answer a request; False when the stream has gone.

        With `end_stream` the answer is all: the client is told to stop
        sending as well.
        """
        stream = self._streams.get(stream_id)
        if stream is None:
            return False
        self._send_headers(stream_id, headers, end_stream=end_stream)
        stream.answered = True
        self._early_resets = max(self._early_resets - 1, 0)
        if end_stream:
            stream.local_ended = True
            if stream.remote_ended:
                self._forget(stream_id)
            else:
                self.reset(stream_id, ErrorCodes.NO_ERROR)
        return True

    def send_budget(self, stream_id: int) -> int:
        """How many payload bytes may be sent on a stream now; 0 or less means wait."""
        stream = self._streams.get(stream_id)
        return 0 if stream is None else min(stream.send.available, self._send.available)

    def write_data_header(
        self, buffer: bytearray | memoryview, offset: int, stream_id: int, size: int
    ) -> None:
        """Account for `size` bytes of payload and put their frame header at `offset`.

        At most `send_budget`, at most `max_frame_bytes`.
        """
        stream = self._streams[stream_id]
        stream.send.use(size)
        self._send.use(size)
        write_header(buffer, offset, size, FrameType.DATA, 0, stream_id)

    def stream_windows(self, stream_id: int) -> tuple[SendWindow, ReceiveWindow] | None:
        """A stream's own windows; None when it has gone."""
        stream = self._streams.get(stream_id)
        return None if stream is None else (stream.send, stream.receive)

    def send_data(self, stream_id: int, payload: bytes | bytearray | memoryview) -> None:
        """The slow way to send: copy one frame's payload to `out`."""
        head = bytearray(HEADER_BYTES)
        self.write_data_header(head, 0, stream_id, len(payload))
        self.out += head
        self.out += payload

    def end(self, stream_id: int) -> None:
        """Send no more on this stream. Nothing happens when it has gone."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.local_ended:
            return
        stream.local_ended = True
        self.out += header(0, FrameType.DATA, FLAG_END_STREAM, stream_id)
        if stream.remote_ended:
            self._forget(stream_id)

    def reset(self, stream_id: int, error_code: ErrorCodes) -> None:
        """End a stream in both directions. Nothing happens when it has gone."""
        if self._streams.pop(stream_id, None) is not None:
            self._cut_off(stream_id, error_code)

    def _cut_off(self, stream_id: int, error_code: ErrorCodes) -> None:
        self._cut[stream_id] = None
        if len(self._cut) > _CUT_REMEMBERED:
            del self._cut[next(iter(self._cut))]
        self.out += header(4, FrameType.RST_STREAM, 0, stream_id) + error_code.to_bytes(4, "big")

    def credit(self, stream_id: int, size: int) -> None:
        """`size` payload bytes have left for good: the peer may send as many again."""
        increment = self._receive.credit(size)
        if increment:
            self._window_update(0, increment)
        stream = self._streams.get(stream_id)
        if stream is not None and not stream.remote_ended:
            increment = stream.receive.credit(size)
            if increment:
                self._window_update(stream_id, increment)

    def ping(self, payload: bytes) -> None:
        """Ask for a sign of life; PingAnswered follows. 8 bytes of payload."""
        self._h2.ping(payload)
        self._take_h2_output()

    def new_period(self) -> None:
        """Some time has passed (ten seconds, by the driver): forget how talkative the peer was."""
        self._control_frames = 0

    def go_away(self, error_code: ErrorCodes) -> None:
        """Take no new streams; those that are open go on unless the driver closes."""
        self.going_away = True
        last = self._highest_seen if self._server else 0
        self._say_goaway(last, error_code)

    def wind_down(self, ping: bytes) -> None:
        """Server: have the client open no more streams, and refuse none that is on its way.

        RFC 9113, 6.8: the highest of all ids first. The answer to `ping` (8
        bytes) shows that the client has read it; then the true id follows,
        and `going_away` is set.
        """
        self._last_words = ping
        self._say_goaway(_HIGHEST_STREAM_ID, ErrorCodes.NO_ERROR)
        self.ping(ping)

    # --- receiving --------------------------------------------------------

    def peer_ended(self, stream_id: int) -> list[Event]:
        """The last DATA frame of a stream was read by somebody else (the relay in C)."""
        events: list[Event] = []
        self._on_stream_ended(stream_id, events)
        return events

    def receive(self, data: memoryview) -> list[Event]:
        """Act on received plaintext. Views in events point into `data`.

        Raises PeerError; the events before the fault are lost, for the
        connection is.
        """
        events: list[Event] = []
        gathering: DataReceived | None = None
        size = 0
        for piece in self.splitter.feed(data):
            if isinstance(piece, Frame):
                gathering = None
                self._on_frame(piece, events)
                continue
            if self._accept_data(piece, events) and piece.payload:
                # Pieces of one stream in a row become one event: one send.
                size = len(piece.payload)
                if gathering is not None and gathering.stream_id == piece.stream_id:
                    gathering.views.append(piece.payload)
                    gathering = _longer(events, gathering, size)
                else:
                    gathering = DataReceived(piece.stream_id, [piece.payload], size)
                    events.append(gathering)
            if piece.ends_stream and piece.stream_id in self._streams:
                gathering = None
                self._on_stream_ended(piece.stream_id, events)
        return events

    def _accept_data(self, piece: Data, events: list[Event]) -> bool:
        """Account for a piece of DATA; False when its stream does not take it."""
        if piece.announced and not self._receive.take(piece.announced):
            raise PeerError(ErrorCodes.FLOW_CONTROL_ERROR, "more DATA than the connection's window")
        stream = self._streams.get(piece.stream_id)
        if stream is None:
            if piece.stream_id > self._highest_seen:
                raise PeerError(ErrorCodes.PROTOCOL_ERROR, "DATA on a stream that was never opened")
            # It was on its way when the stream ended: drop it, but keep the
            # connection's window whole.
            self.credit(piece.stream_id, piece.padding + len(piece.payload))
            if piece.stream_id not in self._cut:
                # No, the peer itself had ended it (RFC 9113, 5.1). Told once.
                self._cut_off(piece.stream_id, ErrorCodes.STREAM_CLOSED)
            return False
        fault = None
        if stream.remote_ended:
            fault = ErrorCodes.STREAM_CLOSED
        elif not self._server and not stream.answered:
            fault = ErrorCodes.PROTOCOL_ERROR
        elif piece.announced and not stream.receive.take(piece.announced):
            fault = ErrorCodes.FLOW_CONTROL_ERROR
        if fault is not None:
            self.reset(piece.stream_id, fault)
            events.append(StreamReset(piece.stream_id, fault, by_peer=False))
            self.credit(piece.stream_id, piece.padding + len(piece.payload))
            return False
        if piece.padding:
            self.credit(piece.stream_id, piece.padding)
        return True

    def _on_frame(self, frame: Frame, events: list[Event]) -> None:
        if frame.type not in _PRODUCTIVE:
            self._control_frames += 1
            if self._control_frames > CONTROL_FRAME_LIMIT:
                raise PeerError(ErrorCodes.ENHANCE_YOUR_CALM, "a flood of control frames")
        match frame.type:
            case FrameType.HEADERS | FrameType.CONTINUATION:
                self._on_headers(frame, events)
            case FrameType.WINDOW_UPDATE:
                events.extend(self._on_window_update(frame))
            case FrameType.RST_STREAM:
                self._on_stream_reset(frame, events)
            case FrameType.GOAWAY:
                events.extend(self._on_go_away(frame))
            case FrameType.PRIORITY:
                _check_priority(frame.stream_id, frame.payload)
            case FrameType.PUSH_PROMISE:
                raise PeerError(ErrorCodes.PROTOCOL_ERROR, "PUSH_PROMISE, which we forbid")
            case _:
                self._on_settings_or_ping(frame, events)

    def _on_window_update(self, frame: Frame) -> Iterator[Event]:
        payload = frame.payload
        if len(payload) != 4:
            raise PeerError(ErrorCodes.FRAME_SIZE_ERROR, "WINDOW_UPDATE is not 4 bytes long")
        increment = int.from_bytes(payload, "big") & 0x7FFFFFFF
        stream_id = frame.stream_id
        if stream_id == 0:
            if increment == 0:
                raise PeerError(ErrorCodes.PROTOCOL_ERROR, "WINDOW_UPDATE by 0")
            try:
                self._send.change(increment)
            except WindowOverflowError:
                raise PeerError(
                    ErrorCodes.FLOW_CONTROL_ERROR, "the connection's window passes 2^31-1"
                ) from None
            yield SendWindowOpened(0)
            return
        stream = self._streams.get(stream_id)
        if stream is None:
            if stream_id > self._highest_seen:
                raise PeerError(ErrorCodes.PROTOCOL_ERROR, "WINDOW_UPDATE on an idle stream")
            return
        fault = ErrorCodes.PROTOCOL_ERROR if increment == 0 else None
        try:
            stream.send.change(increment)
        except WindowOverflowError:
            fault = ErrorCodes.FLOW_CONTROL_ERROR
        if fault is not None:
            self.reset(stream_id, fault)
            yield StreamReset(stream_id, fault, by_peer=False)
        else:
            yield SendWindowOpened(stream_id)

    def _on_go_away(self, frame: Frame) -> Iterator[Event]:
        payload = frame.payload
        if frame.stream_id:
            raise PeerError(ErrorCodes.PROTOCOL_ERROR, "GOAWAY of a stream")
        if len(payload) < 8:
            raise PeerError(ErrorCodes.FRAME_SIZE_ERROR, "GOAWAY is shorter than 8 bytes")
        last = int.from_bytes(payload[:4], "big") & 0x7FFFFFFF
        error_code = int.from_bytes(payload[4:8], "big")
        self.going_away = True
        yield GoAwayReceived(last, error_code)
        if not self._server:
            for stream_id in [each for each in self._streams if each > last]:
                self._forget(stream_id)
                yield StreamReset(stream_id, ErrorCodes.REFUSED_STREAM, by_peer=True)

    def _on_settings_or_ping(self, frame: Frame, events: list[Event]) -> None:
        seen = self._h2.feed(frame.raw)
        self._take_h2_output()
        for event in seen:
            match event:
                case h2.events.RemoteSettingsChanged():
                    events.append(self._on_settings(event))
                case h2.events.PingAckReceived():
                    if self._last_words and event.ping_data == self._last_words:
                        self.go_away(ErrorCodes.NO_ERROR)
                    events.append(PingAnswered())
                case _:
                    pass  # answered by h2 itself (PING, our SETTINGS acknowledged)

    def _on_headers(self, frame: Frame, events: list[Event]) -> None:
        """Gather a header block; act on it once it is whole."""
        begun = self._block
        if begun is not None:
            # The splitter has seen to it that it is a CONTINUATION of this one.
            block, ends_stream = begun.raw + frame.payload, begun.flags & FLAG_END_STREAM
            self._block = None
            self._continuations += 1
            if self._continuations > CONTINUATION_LIMIT:
                raise PeerError(ErrorCodes.PROTOCOL_ERROR, "a header block in too many pieces")
        else:
            block, ends_stream = _block_of(frame), frame.flags & FLAG_END_STREAM
            self._continuations = 0
        if not frame.flags & FLAG_END_HEADERS:
            flags = FLAG_END_STREAM if ends_stream else 0
            self._block = Frame(FrameType.HEADERS, flags, frame.stream_id, block)
            return
        # Decoded in any case, for the state of the peer's encoder.
        headers = self._h2.headers.decode(block)
        stream_id = frame.stream_id
        stream = self._streams.get(stream_id)
        if stream is not None:
            if stream.remote_ended:
                raise PeerError(ErrorCodes.STREAM_CLOSED, "HEADERS after the end of a stream")
            if self._server or stream.answered:
                if not ends_stream:
                    raise PeerError(ErrorCodes.PROTOCOL_ERROR, "trailers that do not end a stream")
            elif not self._on_response(stream, stream_id, headers, events):
                return
        elif self._server and stream_id & 1 and stream_id > self._highest_seen:
            if not self._on_request(stream_id, headers, events):
                return
        elif stream_id in self._cut:
            return
        elif stream_id <= self._highest_seen and stream_id & 1:
            raise PeerError(ErrorCodes.STREAM_CLOSED, "HEADERS on a closed stream")
        else:
            raise PeerError(ErrorCodes.PROTOCOL_ERROR, "the peer opened a stream with a wrong id")
        if ends_stream:
            self._on_stream_ended(stream_id, events)

    def _on_request(self, stream_id: int, headers: Headers, events: list[Event]) -> bool:
        """Server: a new stream; False when it is refused."""
        self._highest_seen = stream_id
        self._streams[stream_id] = _Stream(self._peer_initial_window, self._stream_window)
        if self.going_away or len(self._streams) > SERVER_MAX_STREAMS:
            # The client may try again elsewhere: we did nothing with it.
            self.reset(stream_id, ErrorCodes.REFUSED_STREAM)
            return False
        line = read_request(headers)
        events.append(
            RequestReceived(stream_id, line.method, line.authority, headers, line.well_formed)
        )
        return True

    def _on_response(
        self, stream: _Stream, stream_id: int, headers: Headers, events: list[Event]
    ) -> bool:
        """Client: the answer, or an interim one; False when the stream has gone."""
        status = read_status(headers)
        if status == 0:
            self.reset(stream_id, ErrorCodes.PROTOCOL_ERROR)
            events.append(StreamReset(stream_id, ErrorCodes.PROTOCOL_ERROR, by_peer=False))
            return False
        if status >= _FIRST_FINAL_STATUS:
            stream.answered = True
            events.append(ResponseReceived(stream_id, status, headers))
        return True

    def _on_stream_ended(self, stream_id: int, events: list[Event]) -> None:
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        if not self._server and not stream.answered:
            self.reset(stream_id, ErrorCodes.PROTOCOL_ERROR)
            events.append(StreamReset(stream_id, ErrorCodes.PROTOCOL_ERROR, by_peer=False))
            return
        stream.remote_ended = True
        if stream.local_ended:
            del self._streams[stream_id]
        events.append(StreamEnded(stream_id))

    def _on_stream_reset(self, frame: Frame, events: list[Event]) -> None:
        payload, stream_id = frame.payload, frame.stream_id
        if len(payload) != 4:
            raise PeerError(ErrorCodes.FRAME_SIZE_ERROR, "RST_STREAM is not 4 bytes long")
        if stream_id > self._highest_seen or not stream_id & 1:
            raise PeerError(ErrorCodes.PROTOCOL_ERROR, "RST_STREAM on an idle stream")
        stream = self._streams.pop(stream_id, None)
        if stream is None:
            return
        if self._server and not stream.answered:
            # "Rapid reset": opening and dropping streams costs the client
            # nothing and us a dial each.
            self._early_resets += 1
            if self._early_resets > EARLY_RESET_LIMIT:
                raise PeerError(ErrorCodes.ENHANCE_YOUR_CALM, "too many streams reset unanswered")
        events.append(StreamReset(stream_id, int.from_bytes(payload, "big"), by_peer=True))

    def _on_settings(self, event: h2.events.RemoteSettingsChanged) -> Event:
        changed = event.changed_settings
        window = changed.get(SettingCodes.INITIAL_WINDOW_SIZE)
        if window is not None:
            delta = window.new_value - self._peer_initial_window
            self._peer_initial_window = window.new_value
            try:
                for stream in self._streams.values():
                    stream.send.change(delta)
            except WindowOverflowError:
                raise PeerError(
                    ErrorCodes.FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE makes a window overflow"
                ) from None
        remote = self._h2.remote_settings
        self.max_frame_bytes = remote.max_frame_size
        self.max_streams = min(int(remote.max_concurrent_streams), _NO_STREAM_LIMIT)
        return SettingsReceived(self.max_streams)

    # --- helpers ----------------------------------------------------------

    def _send_headers(self, stream_id: int, headers: Headers, *, end_stream: bool) -> None:
        block = self._encoder.encode(headers)
        kind, flags = FrameType.HEADERS, FLAG_END_STREAM if end_stream else 0
        while len(block) > _DEFAULT_MAX_FRAME_BYTES:
            self.out += header(_DEFAULT_MAX_FRAME_BYTES, kind, flags, stream_id)
            self.out += block[:_DEFAULT_MAX_FRAME_BYTES]
            block = block[_DEFAULT_MAX_FRAME_BYTES:]
            kind, flags = FrameType.CONTINUATION, 0
        self.out += header(len(block), kind, flags | FLAG_END_HEADERS, stream_id)
        self.out += block

    def _take_h2_output(self) -> None:
        self.out += self._h2.data_to_send()

    def _window_update(self, stream_id: int, increment: int) -> None:
        self.out += header(4, FrameType.WINDOW_UPDATE, 0, stream_id)
        self.out += increment.to_bytes(4, "big")

    def _say_goaway(self, last: int, error_code: ErrorCodes) -> None:
        payload = last.to_bytes(4, "big") + int(error_code).to_bytes(4, "big")
        self.out += header(len(payload), FrameType.GOAWAY, 0, 0) + payload

    def _forget(self, stream_id: int) -> None:
        self._streams.pop(stream_id, None)


def _block_of(frame: Frame) -> bytes:
    """The fragment of a HEADERS frame, without padding and priority."""
    block, flags = frame.payload, frame.flags
    if frame.stream_id == 0:
        raise PeerError(ErrorCodes.PROTOCOL_ERROR, "HEADERS on stream 0")
    if flags & FLAG_PADDED:
        if not block:
            raise PeerError(ErrorCodes.FRAME_SIZE_ERROR, "padded HEADERS without a pad length")
        end = len(block) - block[0]
        if end < 1:
            raise PeerError(ErrorCodes.PROTOCOL_ERROR, "more padding than frame")
        block = block[1:end]
    if flags & FLAG_PRIORITY:
        _check_priority(frame.stream_id, block[:_PRIORITY_BYTES])
        block = block[_PRIORITY_BYTES:]
    return block


def _check_priority(stream_id: int, priority: bytes) -> None:
    """We have no use for it; but it must be one (RFC 9113, 6.3 and RFC 7540, 5.3.1)."""
    if len(priority) != _PRIORITY_BYTES:
        raise PeerError(ErrorCodes.FRAME_SIZE_ERROR, "a priority is not 5 bytes long")
    if stream_id == 0 or int.from_bytes(priority[:4], "big") & 0x7FFFFFFF == stream_id:
        raise PeerError(ErrorCodes.PROTOCOL_ERROR, "a priority of no stream, or of its own")


def _longer(events: list[Event], gathered: DataReceived, more: int) -> DataReceived:
    """Replace the last event by one that counts `more` bytes (events are frozen)."""
    longer = DataReceived(gathered.stream_id, gathered.views, gathered.size + more)
    events[-1] = longer
    return longer
