"""The buffers of the hot path, one set for the whole process.

Between filling a buffer and being done with it no task switch happens, so
every tunnel and every stream can use the same memory: ten thousand idle
connections cost no buffer at all.
"""

from __future__ import annotations

from collections.abc import Callable

from meshbpf.agent.wire.frames import HEADER_BYTES
from meshbpf.agent.wire.records import RECORD_BYTES

_SMALL_FRAME_BYTES = 16384
"""What every HTTP/2 peer takes."""
CHUNK_BYTES = 16 * RECORD_BYTES - HEADER_BYTES
"""The most that is read from an app at once: with its frame header, 16 full TLS records."""
READ_BYTES = 256 * 1024


class Layout:
    """A buffer for DATA frames with room for a header before each payload.

    The kernel scatters one read over the payload slots, so that frames of
    any size leave the buffer in one TLS write, without having been moved.
    """

    def __init__(self, payload_bytes: int, frames: int) -> None:
        stride = HEADER_BYTES + payload_bytes
        self.payload_bytes = payload_bytes
        self.buffer = bytearray(stride * frames)
        self.view = memoryview(self.buffer)
        self.capacity = payload_bytes * frames
        self._stride = stride
        self._slots = [
            self.view[start + HEADER_BYTES : start + stride]
            for start in range(0, stride * frames, stride)
        ]

    def slots(self, limit: int) -> list[memoryview]:
        """Where to read at most `limit` bytes to."""
        if limit >= self.capacity:
            return self._slots
        whole, rest = divmod(limit, self.payload_bytes)
        slots = self._slots[:whole]
        if rest:
            slots.append(self._slots[whole][:rest])
        return slots

    def frame(self, size: int, write_header: Callable[[bytearray, int, int], None]) -> memoryview:
        """Put headers before `size` read bytes: `write_header(buffer, offset, length)` each."""
        position = 0
        while size:
            length = min(size, self.payload_bytes)
            write_header(self.buffer, position, length)
            position += HEADER_BYTES + length
            size -= length
        return self.view[:position]


class Scratch:
    """All shared buffers."""

    def __init__(self) -> None:
        self.ciphertext = memoryview(bytearray(READ_BYTES))
        self.plaintext = memoryview(bytearray(READ_BYTES))
        self.outgoing = memoryview(bytearray(2 * READ_BYTES))
        """Ciphertext on its way to a socket: a chunk and its records' overhead fit."""
        self._whole = Layout(CHUNK_BYTES, 1)
        self._small = Layout(_SMALL_FRAME_BYTES, CHUNK_BYTES // _SMALL_FRAME_BYTES)

    def layout(self, max_frame_bytes: int) -> Layout:
        """The layout for a peer that takes frames of up to `max_frame_bytes`.

        Two are enough: nothing obliges us to fill frames of odd sizes.
        """
        return self._whole if max_frame_bytes >= CHUNK_BYTES else self._small


SCRATCH = Scratch()
