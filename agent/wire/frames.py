"""Cuts a tunnel's plaintext into HTTP/2 frames, before the h2 library sees any.

Rules:
1. DATA is never gathered: its payload is handed on piece by piece as views
   into the caller's buffer, padding taken off.
2. Every other frame of a known type is gathered whole, in a bounded buffer.
3. A header block (HEADERS, CONTINUATION...) is neither interrupted nor longer
   than its limit.
4. The first frame is SETTINGS; on a server, after the client's preface.
5. Frames of unknown type are skipped, payload and all.

Breaking one is a `PeerError` with the code that RFC 9113 names.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

from h2.errors import ErrorCodes

from meshbpf.agent.wire.errors import PeerError

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADER_BYTES = 9
HEADER_BLOCK_LIMIT_BYTES = 64 * 1024
"""A block that decodes to the 64 KiB that we accept is never longer than this encoded."""
CONTROL_FRAME_LIMIT_BYTES = 16 * 1024
"""For SETTINGS, GOAWAY and the like; senders keep to 16 KiB or far less."""

FLAG_END_STREAM = 0x1
FLAG_ACK = 0x1
FLAG_END_HEADERS = 0x4
FLAG_PADDED = 0x8
FLAG_PRIORITY = 0x20

# Length (24 bits, as 16 + 8), type, flags, stream with a reserved first bit.
_HEADER = struct.Struct(">HBBBL")
_STREAM_MASK = 0x7FFFFFFF


class FrameType(IntEnum):
    """RFC 9113, section 6."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


_DATA = int(FrameType.DATA)
_HEADERS = int(FrameType.HEADERS)
_CONTINUATION = int(FrameType.CONTINUATION)
_SETTINGS = int(FrameType.SETTINGS)
_BLOCK_TYPES = frozenset({_HEADERS, int(FrameType.PUSH_PROMISE), _CONTINUATION})
_LAST_KNOWN = int(FrameType.CONTINUATION)


class Frame(NamedTuple):
    """A whole frame that is not DATA. `raw` is the frame as it came, header included."""

    type: int
    flags: int
    stream_id: int
    raw: bytes

    @property
    def payload(self) -> bytes:
        """What follows the frame header."""
        return self.raw[HEADER_BYTES:]


class Data(NamedTuple):
    """A piece of a DATA frame.

    `announced` is the frame's flow-controlled length on its first piece and 0
    on the others; `padding` counts the bytes of this piece that are no
    payload; `ends_stream` stands on the last piece of a frame with END_STREAM.
    """

    stream_id: int
    payload: memoryview
    announced: int
    padding: int
    ends_stream: bool


def header(size: int, kind: int, flags: int, stream_id: int) -> bytes:
    """A frame header for a payload of `size` bytes."""
    return _HEADER.pack(size >> 8, size & 0xFF, kind, flags, stream_id)


def write_header(
    buffer: bytearray | memoryview, offset: int, size: int, kind: int, flags: int, stream_id: int
) -> None:
    """Put a frame header into a buffer that has room for it in front of the payload."""
    _HEADER.pack_into(buffer, offset, size >> 8, size & 0xFF, kind, flags, stream_id)


class FrameSplitter:
    """Holds what is left of an unfinished frame between two calls of `feed`."""

    def __init__(self, *, server: bool, max_frame_bytes: int) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._preface = PREFACE if server else b""
        self._first = True
        self._partial = bytearray()
        """Beginning of a frame that is not DATA, or of any frame's header."""
        self._skip = 0
        """Bytes of an unknown frame still to be dropped."""
        self._block_stream = 0
        """The stream whose header block is open, or 0."""
        self._block_bytes = 0
        # The DATA frame that is being read.
        self._data_stream = 0
        self._payload_left = 0
        self._padding_left = 0
        self._pad_length_due = False
        self._announced = 0
        self._ends_stream = False
        self._in_data = False

    def feed(self, data: memoryview) -> Iterator[Frame | Data]:
        """What `data` completes, in order. Consume it before the buffer is used again."""
        position = 0
        size = len(data)
        if self._preface:
            position = self._eat_preface(data)
        while position < size or self._in_data:
            if self._in_data:
                piece, position = self._data_piece(data, position)
                if piece is None:
                    return
                yield piece
            elif self._skip:
                step = min(self._skip, size - position)
                self._skip -= step
                position += step
            else:
                frame, position = self._frame(data, position)
                if frame is not None:
                    yield frame

    def _eat_preface(self, data: memoryview) -> int:
        step = min(len(self._preface), len(data))
        if self._preface[:step] != data[:step]:
            raise PeerError(ErrorCodes.PROTOCOL_ERROR, "the peer does not speak HTTP/2")
        self._preface = self._preface[step:]
        return step

    def _frame(self, data: memoryview, position: int) -> tuple[Frame | None, int]:
        """Read a frame header at `position`, and the frame if it is all there."""
        partial = self._partial
        if partial:
            # Take only what completes the header, then the frame.
            if len(partial) < HEADER_BYTES:
                position = self._gather(data, position, HEADER_BYTES)
                if len(partial) < HEADER_BYTES:
                    return None, position
            high, low, kind, flags, stream = _HEADER.unpack_from(partial)
            payload_at = position
        else:
            if len(data) - position < HEADER_BYTES:
                partial += data[position:]
                return None, len(data)
            high, low, kind, flags, stream = _HEADER.unpack_from(data, position)
            payload_at = position + HEADER_BYTES
        size = high << 8 | low
        stream &= _STREAM_MASK
        gathered = len(partial) > HEADER_BYTES
        if not gathered:
            self._check(kind, size, stream)
            if kind == _DATA:
                partial.clear()
                self._begin_data(size, flags, stream)
                return None, payload_at
            if kind > _LAST_KNOWN:
                partial.clear()
                self._skip = size
                return None, payload_at
        total = HEADER_BYTES + size
        if partial:
            position = self._gather(data, position, total)
            if len(partial) < total:
                return None, position
            raw = bytes(partial)
            partial.clear()
        elif len(data) - position >= total:
            raw = bytes(data[position : position + total])
            position += total
        else:
            partial += data[position:]
            return None, len(data)
        self._track_block(kind, flags, stream, size)
        return Frame(kind, flags, stream, raw), position

    def _gather(self, data: memoryview, position: int, until: int) -> int:
        step = min(until - len(self._partial), len(data) - position)
        self._partial += data[position : position + step]
        return position + step

    def _check(self, kind: int, size: int, stream: int) -> None:
        """Refuse what a header alone shows to be wrong."""
        if size > self._max_frame_bytes:
            raise PeerError(ErrorCodes.FRAME_SIZE_ERROR, f"a frame of {size} bytes")
        if self._first:
            if kind != _SETTINGS:
                raise PeerError(ErrorCodes.PROTOCOL_ERROR, "the first frame is not SETTINGS")
            self._first = False
        if self._block_stream:
            if kind != _CONTINUATION or stream != self._block_stream:
                raise PeerError(ErrorCodes.PROTOCOL_ERROR, "a header block is interrupted")
        elif kind == _CONTINUATION:
            raise PeerError(ErrorCodes.PROTOCOL_ERROR, "CONTINUATION without a header block")
        if kind in _BLOCK_TYPES:
            if self._block_bytes + size > HEADER_BLOCK_LIMIT_BYTES:
                raise PeerError(ErrorCodes.ENHANCE_YOUR_CALM, "a header block is too long")
        elif kind != _DATA and kind <= _LAST_KNOWN and size > CONTROL_FRAME_LIMIT_BYTES:
            raise PeerError(ErrorCodes.FRAME_SIZE_ERROR, f"a control frame of {size} bytes")
        if kind == _DATA and stream == 0:
            raise PeerError(ErrorCodes.PROTOCOL_ERROR, "DATA on stream 0")

    def _track_block(self, kind: int, flags: int, stream: int, size: int) -> None:
        if kind not in _BLOCK_TYPES:
            return
        if flags & FLAG_END_HEADERS:
            self._block_stream = self._block_bytes = 0
        else:
            self._block_stream = stream
            self._block_bytes += size

    def _begin_data(self, size: int, flags: int, stream: int) -> None:
        self._in_data = True
        self._data_stream = stream
        self._payload_left = size
        self._padding_left = 0
        self._announced = size
        self._ends_stream = bool(flags & FLAG_END_STREAM)
        self._pad_length_due = bool(flags & FLAG_PADDED)
        if self._pad_length_due and size == 0:
            raise PeerError(ErrorCodes.FRAME_SIZE_ERROR, "padded DATA without a pad length")

    def _data_piece(self, data: memoryview, position: int) -> tuple[Data | None, int]:
        """The next piece of the DATA frame; None when `data` is used up before its end."""
        padding = 0
        available = len(data) - position
        if self._pad_length_due and available:
            pad = data[position]
            position += 1
            available -= 1
            padding = 1
            self._pad_length_due = False
            self._payload_left -= 1 + pad
            self._padding_left = pad
            if self._payload_left < 0:
                raise PeerError(ErrorCodes.PROTOCOL_ERROR, "more padding than frame")
        if not available and (self._payload_left or self._padding_left or self._pad_length_due):
            if not padding:
                return None, position
            payload = data[position:position]
        else:
            step = min(self._payload_left, available)
            payload = data[position : position + step]
            position += step
            self._payload_left -= step
            if not self._payload_left and self._padding_left:
                step = min(self._padding_left, len(data) - position)
                self._padding_left -= step
                padding += step
                position += step
        done = not (self._payload_left or self._padding_left or self._pad_length_due)
        self._in_data = not done
        announced, self._announced = self._announced, 0
        return (
            Data(self._data_stream, payload, announced, padding, done and self._ends_stream),
            position,
        )
