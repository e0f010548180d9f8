"""Header blocks read: the plain ones by a few lines, the others by the hpack library.

A block of literals that are not Huffman-coded and not for the table, which is
what our own encoder writes, says everything by itself: reading it takes no
state and leaves none, so the library's table stays right without having seen
it. It costs a tenth of the library's way. Whatever else occurs in a block,
the library reads the whole of it.
"""

from __future__ import annotations

from h2.errors import ErrorCodes
from hpack import Decoder
from hpack.exceptions import HPACKError, OversizedHeaderListError

from meshbpf.agent.wire.errors import PeerError
from meshbpf.agent.wire.events import Headers

_FIELD_OVERHEAD_BYTES = 32
"""What each field counts for in a header list's size, beyond its octets (RFC 9113, 6.5.2)."""
# The only entries of the static table that our encoder uses (RFC 7541, appendix A).
_NAMES = {1: b":authority", 2: b":method", 8: b":status"}
_FIELDS = {0x88: (b":status", b"200"), 0x8C: (b":status", b"400")}
_LONG_STRING = 0x7F
"""The first octet of a string whose length does not fit seven bits; above are Huffman's."""


class HeaderDecoder:
    """One direction of one connection."""

    def __init__(self, library: Decoder, *, max_list_bytes: int) -> None:
        library.max_header_list_size = max_list_bytes
        self._library = library
        self._max_list_bytes = max_list_bytes

    def decode(self, block: bytes) -> Headers:
        """The fields of a whole block. Raises PeerError."""
        plain = _plain(block, self._max_list_bytes)
        if plain is not None:
            return plain
        try:
            fields = self._library.decode(block, raw=True)
            return tuple((bytes(name), bytes(value)) for name, value in fields)
        except OversizedHeaderListError as error:
            raise PeerError(ErrorCodes.ENHANCE_YOUR_CALM, str(error)) from error
        except HPACKError as error:
            raise PeerError(ErrorCodes.PROTOCOL_ERROR, f"a header block: {error}") from error


def _plain(block: bytes, max_list_bytes: int) -> Headers | None:
    """The fields if all are plain; None when the library must read them."""
    size = len(block)
    if size > max_list_bytes // 2:
        return None
    fields: list[tuple[bytes, bytes]] = []
    at = 0
    try:
        while at < size:
            first = block[at]
            at += 1
            if first == 0:
                length = block[at]
                if length >= _LONG_STRING:
                    return None
                at += 1 + length
                name = block[at - length : at]
            elif first in _NAMES:
                name = _NAMES[first]
            elif first in _FIELDS:
                fields.append(_FIELDS[first])
                continue
            else:
                return None
            length = block[at]
            at += 1
            if length >= _LONG_STRING:
                more = block[at]
                if length > _LONG_STRING or more >= 0x80:
                    return None
                length += more
                at += 1
            at += length
            fields.append((name, block[at - length : at]))
    except IndexError:
        return None
    if at != size or size + len(fields) * _FIELD_OVERHEAD_BYTES > max_list_bytes // 2:
        return None
    return tuple(fields)
