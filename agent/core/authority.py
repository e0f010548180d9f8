"""The `:authority` of an HBONE CONNECT: an address or a service's name, with a port."""

from __future__ import annotations

import re
from dataclasses import dataclass

from meshbpf.agent.core.address import AddressError, SocketAddress

# A DNS name as Istio's services have them: underscores and a leading wildcard occur.
_NAMED = re.compile(r"((?:\*\.)?[0-9A-Za-z_](?:[0-9A-Za-z_.-]{0,251}[0-9A-Za-z_])?):([0-9]{1,5})")
_LAST_LABEL_NUMERIC = re.compile(r"(?:.*\.)?[0-9]+")


@dataclass(frozen=True, slots=True)
class HostPort:
    """A service by hostname, at one of its own ports."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


Authority = SocketAddress | HostPort


def parse_authority(text: str) -> Authority:
    """Read it; AddressError when it is neither, or its port is 0 or above 65535."""
    found = _NAMED.fullmatch(text)
    if found is not None and _LAST_LABEL_NUMERIC.fullmatch(found[1]) is None:
        port = int(found[2])
        if port > 65535:
            raise AddressError(f"{text!r}: the port is above 65535")
        authority: Authority = HostPort(found[1], port)
    else:
        authority = SocketAddress.parse(text)
    if authority.port == 0:
        raise AddressError(f"{text!r}: port 0 cannot be dialed")
    return authority
