"""What an AuthorizationPolicy may read of a request or a connection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meshbpf.agent.core.address import AddressError, address_bits, parse_ip
from meshbpf.agent.l7.exchange import Connection, Exchange
from meshbpf.agent.l7.message import Headers

CLAIMS = "jwt.claims"
"""In `Exchange.attributes`: the payload of the verified token that policies read."""

_NO_CLAIMS: Mapping[str, Any] = {}
_NO_HEADERS = Headers()
_NO_ADDRESS = -1
"""In no prefix: shifting it right never makes it a prefix's value."""


class Facts:
    """One request (or, with the HTTP part empty, one connection); made once for each decision."""

    __slots__ = (
        "account",
        "claims",
        "destination",
        "headers",
        "host",
        "method",
        "namespace",
        "path",
        "port",
        "principal",
        "remote",
        "sni",
        "source",
        "trust_domain",
    )

    def __init__(self, connection: Connection) -> None:
        identity = connection.caller.identity
        if identity is None:
            self.principal = self.trust_domain = self.namespace = self.account = ""
        else:
            self.principal = identity.principal
            self.trust_domain = identity.trust_domain
            self.namespace = identity.namespace
            self.account = identity.service_account
        self.source = address_bits(connection.caller.address.ip)
        self.remote = self.source
        address = connection.destination.address
        self.destination = _NO_ADDRESS if address is None else address_bits(address.ip)
        self.port = connection.destination.port
        # The tunnel's own TLS names no server that a policy could mean.
        self.sni = ""
        self.method = self.host = self.path = ""
        self.headers = _NO_HEADERS
        self.claims = _NO_CLAIMS

    @classmethod
    def of(cls, exchange: Exchange) -> Facts:
        """The facts of a request."""
        self = cls(exchange.connection)
        request = exchange.request
        self.method = request.method
        self.host = request.authority.lower()
        self.path = request.path_only
        self.headers = request.headers
        self.claims = exchange.attributes.get(CLAIMS, _NO_CLAIMS)
        forwarded = request.headers.get("x-forwarded-for")
        if forwarded is not None:
            self.remote = _remote(forwarded, self.source)
        return self


def _remote(forwarded: str, source: int) -> int:
    """The last address of X-Forwarded-For, as Envoy takes it behind another proxy of the mesh."""
    try:
        return address_bits(parse_ip(forwarded.rpartition(",")[2].strip()))
    except AddressError:
        return source
