"""Faults of a wire protocol, and the HTTP/2 code that answers each.

A `PeerError` ends the whole connection with GOAWAY. What concerns one stream
only is no exception at all: the connection resets that stream by itself and
reports it as a `StreamReset`. A `UsageError` is our own mistake.
"""

from __future__ import annotations

from h2.errors import ErrorCodes

from meshbpf.agent.core.errors import MeshbpfError


class WireError(MeshbpfError):
    """Something on a tunnel went wrong."""


class TlsError(WireError):
    """The TLS handshake or a TLS record failed."""


class RevokedError(TlsError):
    """A certificate of the peer's chain is in a revocation list."""

    def __init__(self, what: str) -> None:
        super().__init__("cert-revoked", what)


class PeerError(WireError):
    """The peer broke HTTP/2's rules or a limit of ours; the connection must end."""

    def __init__(self, error_code: ErrorCodes, what: str) -> None:
        super().__init__("http2-" + error_code.name.lower().replace("_", "-"), what)
        self.error_code = error_code


class UsageError(WireError):
    """Our own code asked for something that the protocol does not allow now."""

    def __init__(self, what: str) -> None:
        super().__init__("http2-usage", what)
