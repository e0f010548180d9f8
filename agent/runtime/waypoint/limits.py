"""Bounds of what a client or a backend may make the waypoint do. Names say the unit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """All of them; the defaults are Envoy's where it has one."""

    head_bytes: int = 60 * 1024  # Envoy: max_request_headers_kb
    head_s: float = 10.0
    """From a head's first byte to its last: who drips is cut off."""
    idle_s: float = 3600.0
    """Between requests of one connection (Envoy's idle_timeout)."""
    replay_bytes: int = 64 * 1024
    """A request body up to this is kept, so that the request can be tried again."""
    h2_streams: int = 100
    """Requests at a time on one connection."""
    h2_resets: int = 200
    """Requests that a client may take back beyond those that it lets be answered."""
    sniff_s: float = 1.0
    """How long a client may be silent on an undeclared port before the server may speak."""
    pool_idle_s: float = 55.0
    """An unused connection to an endpoint is closed; many servers do after 60 s."""
    pool_idle_connections: int = 64
    """For each endpoint."""


LIMITS = Limits()
