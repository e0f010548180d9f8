"""The numbers of the proxy-wasm ABI 0.2.1 (proxy-wasm/spec, abi-versions/v0.2.1), and its codec."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum

ABI_EXPORTS = ("proxy_abi_version_0_2_1", "proxy_abi_version_0_2_0", "proxy_abi_version_0_1_0")

Pairs = Sequence[tuple[bytes, bytes]]


class Status(IntEnum):
    """What a host function answers."""

    OK = 0
    NOT_FOUND = 1
    BAD_ARGUMENT = 2
    SERIALIZATION_FAILURE = 3
    INVALID_MEMORY_ACCESS = 6
    EMPTY = 7
    CAS_MISMATCH = 8
    INTERNAL_FAILURE = 10
    UNIMPLEMENTED = 12


class MapType(IntEnum):
    """Which header map."""

    REQUEST_HEADERS = 0
    REQUEST_TRAILERS = 1
    RESPONSE_HEADERS = 2
    RESPONSE_TRAILERS = 3
    CALL_RESPONSE_HEADERS = 6
    CALL_RESPONSE_TRAILERS = 7


class BufferType(IntEnum):
    """Which buffer."""

    REQUEST_BODY = 0
    RESPONSE_BODY = 1
    CALL_RESPONSE_BODY = 4
    VM_CONFIGURATION = 6
    PLUGIN_CONFIGURATION = 7


class StreamType(IntEnum):
    """Which half of a stream is continued or closed."""

    REQUEST = 0
    RESPONSE = 1


class MetricType(IntEnum):
    """What a metric may do."""

    COUNTER = 0
    GAUGE = 1
    HISTOGRAM = 2


CONTINUE = 0
PAUSE = 1
LEVELS = ("debug", "debug", "info", "warning", "error", "error")
"""By proxy-wasm's trace, debug, info, warn, error and critical."""


def encode_pairs(pairs: Pairs) -> bytes:
    """A header map for a guest: count, sizes, then names and values, each ended by a zero."""
    sizes = [len(part) for pair in pairs for part in pair]
    head = struct.pack(f"<I{len(sizes)}I", len(pairs), *sizes)
    return head + b"".join(part + b"\0" for pair in pairs for part in pair)


def decode_pairs(data: bytes) -> list[tuple[bytes, bytes]]:
    """A header map from a guest; ValueError when it is none."""
    if not data:
        return []
    try:
        (count,) = struct.unpack_from("<I", data)
        if count > len(data) // 8:
            raise ValueError("a header map that is longer than its own bytes")
        sizes = struct.unpack_from(f"<{2 * count}I", data, 4)
    except struct.error:
        raise ValueError("a header map that ends in its sizes") from None
    at, parts = 4 + 8 * count, []
    for size in sizes:
        if at + size > len(data):
            raise ValueError("a header map that ends in its fields")
        parts.append(data[at : at + size])
        at += size + 1
    return list(zip(parts[0::2], parts[1::2], strict=True))
