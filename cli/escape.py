"""Text that others wrote, made safe for a terminal.

Pod names, hostnames and error texts reach this command from mesh state, from
peers' certificates and from the kernel. A control byte among them could move
the cursor, rewrite lines already printed, or (bidirectional overrides) show
text in another order than it has. Every cell and every message therefore goes
through here; nothing else in the package writes foreign text.
"""

from __future__ import annotations

import unicodedata

# Cc controls, Cf formats (bidi, zero width), Cs surrogates (undecodable bytes of
# a file name), Co private, Cn unassigned, Zl and Zp line separators.
_HARMFUL = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def _escaped(char: str) -> str:
    point = ord(char)
    if point < 0x100:
        return f"\\x{point:02x}"
    return f"\\u{point:04x}" if point < 0x10000 else f"\\U{point:08x}"


def printable(text: str) -> str:
    r"""`text` with every control, format or line-separator character spelled as ``\x1b``."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(c) if unicodedata.category(c) in _HARMFUL else c for c in text)
