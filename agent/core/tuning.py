"""How sockets and tunnels are tuned; the defaults are ztunnel's (istio/ztunnel, src/config.rs)."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Keepalive:
    """TCP keepalive of every data socket, see tcp(7).

    A proxy ends the probes of the applications at both its sides, so it must
    send its own, well within the ten minutes after which load balancers forget.
    """

    enabled: bool = True
    time_s: int = 180
    """TCP_KEEPIDLE: silence before the first probe."""
    interval_s: int = 180
    """TCP_KEEPINTVL."""
    retries: int = 9
    """TCP_KEEPCNT: unanswered probes that end the connection."""
    user_timeout: bool = False
    """Unacknowledged data ends a connection after the same time as unanswered probes."""

    @property
    def user_timeout_ms(self) -> int:
        """TCP_USER_TIMEOUT; 0 leaves it to the kernel."""
        seconds = self.time_s + self.interval_s * self.retries
        return seconds * 1000 if self.user_timeout else 0


@dataclass(frozen=True, slots=True)
class Tuning:
    """Of all pods of a node."""

    keepalive: Keepalive = Keepalive()
    stream_window_bytes: int = 4 * MIB
    """What a peer may send on one stream before its app has read any of it."""
    tunnel_window_bytes: int = 16 * MIB
    """The same for all streams of a tunnel together."""
    tunnel_streams: int = 100
    """Connections that share a tunnel; the next one opens another."""
    tunnel_idle_s: float = 300.0
    """How long a tunnel without streams is kept."""


ZTUNNELS = Tuning()
"""As ztunnel is when nobody says otherwise."""
