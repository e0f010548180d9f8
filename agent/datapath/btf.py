"""The few bytes of BTF that socket storage maps want, built by hand.

The kernel makes a BPF_MAP_TYPE_SK_STORAGE map only when BTF says that its key
is a 32-bit int and its value has the size asked for. Nothing reads more of it
than that, so every value is described as what it is to us: an array of bytes.
Format: the kernel's Documentation/bpf/btf.rst.
"""

from __future__ import annotations

import struct
from typing import Final

KEY_TYPE: Final = 1
VALUE_TYPE: Final = 3

_MAGIC: Final = 0xEB9F
_VERSION: Final = 1
_HEADER: Final = "=HBBIIIII"
_KIND_INT: Final = 1
_KIND_ARRAY: Final = 3
_SIGNED: Final = 1


def storage_btf(value_size: int) -> bytes:
    """BTF in which type KEY_TYPE is `int` and VALUE_TYPE is `value_size` bytes."""
    strings = b"\0int\0byte\0"
    types = (
        _integer(strings.index(b"int\0"), size=4, encoding=_SIGNED)  # type 1
        + _integer(strings.index(b"byte\0"), size=1, encoding=0)  # type 2
        # Type 3: elements of type 2, indexed by type 1.
        + struct.pack("=IIIIII", 0, _KIND_ARRAY << 24, 0, 2, 1, value_size)
    )
    header_bytes = struct.calcsize(_HEADER)
    header = struct.pack(
        _HEADER, _MAGIC, _VERSION, 0, header_bytes, 0, len(types), len(types), len(strings)
    )
    return header + types + strings


def _integer(name: int, *, size: int, encoding: int) -> bytes:
    return struct.pack("=IIII", name, _KIND_INT << 24, size, encoding << 24 | size * 8)
