"""Fields for h11 that it need not look at again.

h11 checks every field of what it is to send by regular expressions: a third
of what a proxied request costs in it. What it has parsed itself, or h2 has,
was checked then; what filters have added since could hold a line break, and
could frame the message twice. That is all that is looked for here.

`Headers` is h11's own type for checked fields; the one import of its inside.
"""

from __future__ import annotations

import re

from h11._headers import Headers

from meshbpf.agent.l7.message import RawHeaders
from meshbpf.agent.runtime.waypoint.message import FaultyPeerError

_NO_VALUE = re.compile(rb"[\0\r\n]")
_NO_NAME = re.compile(rb"[^!#$%&'*+.^_`|~0-9a-z\x00-]")


def checked(fields: RawHeaders) -> Headers:
    """The fields as h11 has them. FaultyPeerError for what would break the message apart."""
    framed = False
    full: list[tuple[bytes, bytes, bytes]] = []
    for name, value in fields:
        if name == b"content-length":
            if framed:
                continue  # HTTP/2 lets a peer repeat it; h2 has seen that they agree
            framed = True
        full.append((name, name, value))
    names = b"\0".join([name for name, _ in fields])
    if _NO_NAME.search(names) is not None or b"\0\0" in names:
        raise FaultyPeerError("a field's name is none", 502)
    if _NO_VALUE.search(b" ".join([value for _, value in fields])) is not None:
        raise FaultyPeerError("a field's value has a line break", 502)
    return Headers(full)
