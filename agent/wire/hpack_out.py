"""Header blocks written without compression state (RFC 7541, section 6.2.2).

A tunnel's headers are few and short, and most of a block is the same for
every stream. The dynamic table would save bytes on a link that carries
gigabits, at 100 microseconds a block in Python; plain literals cost a tenth,
and a constant field is encoded once. The decoder at the other end has less to
do as well.

The very first block announces a dynamic table of size 0 (0x20), so that no
later change of the peer's HEADER_TABLE_SIZE asks for a size update.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

_TABLE_SIZE_ZERO = b"\x20"
# Names that the static table holds (RFC 7541, appendix A).
_STATIC_NAMES = {b":authority": 1, b":method": 2, b":status": 8}
_WHOLE_FIELDS = {
    (b":status", b"200"): b"\x88",
    (b":status", b"400"): b"\x8c",
}


class LiteralEncoder:
    """Stands where the h2 library expects hpack's Encoder."""

    def __init__(self) -> None:
        self._prefix = _TABLE_SIZE_ZERO
        self.header_table_size = 0
        """Set by h2 when the peer's SETTINGS change; a table of size 0 fits any of them."""

    def encode(self, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
        """One header block."""
        block = self._prefix + b"".join([field(name, value) for name, value in headers])
        self._prefix = b""
        return block


def field(name: bytes, value: bytes) -> bytes:
    """One field. Its name is encoded once; short-lived values are not remembered."""
    whole = _WHOLE_FIELDS.get((name, value))
    return whole if whole is not None else _name(name) + _string(value)


@lru_cache(maxsize=64)
def _name(name: bytes) -> bytes:
    index = _STATIC_NAMES.get(name)
    return bytes((index,)) if index is not None else b"\x00" + _string(name)


def _string(text: bytes) -> bytes:
    """Length with a 7-bit prefix (RFC 7541, section 5.1), then the octets as they are."""
    size = len(text)
    if size < 127:
        return bytes((size,)) + text
    encoded = bytearray((127,))
    size -= 127
    while size >= 128:
        encoded.append(size & 0x7F | 0x80)
        size >>= 7
    encoded.append(size)
    return bytes(encoded) + text
