"""Deterministic bytes whose digest shows loss, duplication and reordering.

A stream is a seeded one-MiB block sent again and again, each time with its
number in front: a block that goes missing, comes twice or in the wrong place
changes the digest of everything behind it. No array of the whole stream ever
exists, so five GiB cost no more memory than one.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

BLOCK_BYTES = 1 << 20


def blocks(size_bytes: int, seed: int) -> Iterator[memoryview]:
    """The stream of `size_bytes` bytes, in pieces of at most one MiB."""
    block = bytearray(random.Random(seed).randbytes(BLOCK_BYTES))
    number = 0
    while size_bytes > 0:
        block[:8] = number.to_bytes(8, "big")
        piece = min(BLOCK_BYTES, size_bytes)
        # A copy: the receiver of the last piece may still be sending it.
        yield memoryview(bytes(block))[:piece]
        size_bytes -= piece
        number += 1


def digest(size_bytes: int, seed: int) -> str:
    """The SHA-256 that a receiver of the whole stream must arrive at."""
    sha = hashlib.sha256()
    for piece in blocks(size_bytes, seed):
        sha.update(piece)
    return sha.hexdigest()
