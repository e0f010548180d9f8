"""The sockets of the data plane: what the forwarder needs made for it, and their options.

Listeners, dials and the spoofed dial to an app are all opened inside a pod's
network namespace, and the kernel programs must know them for the agent's own,
else they would be captured again. Both are the datapath's business; the
forwarder sees only `SocketFactory`.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import Protocol

import trio

from meshbpf.agent.core.address import IPAddress, SocketAddress, ip_text
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.tuning import Keepalive

CONNECT_TIMEOUT_S = 10.0
"""As ztunnel's; fixed there too."""

_LINGER_RESET = struct.pack("ii", 1, 0)


class DialError(MeshbpfError):
    """A TCP connection that could not be made."""


class SocketFactory(Protocol):
    """Makes non-blocking sockets in one pod's network namespace, known to the kernel as ours."""

    def listener(self, role: int, family: int) -> socket.socket:
        """A listening socket for `role` (see datapath.steering.Role)."""
        ...

    def outbound(self, family: int) -> socket.socket:
        """An unbound socket for dialing out of the pod."""
        ...

    def datagram(self, family: int) -> socket.socket:
        """An unbound UDP socket for asking the pod's resolver."""
        ...

    def dns_reply(self, resolver: SocketAddress) -> socket.socket:
        """A UDP socket that sends from the resolver's address and port."""
        ...

    def to_app(self, family: int, client: IPAddress | None) -> socket.socket:
        """A socket for dialing the pod's app, bound to the client's address when given.

        None, or a client that is the pod itself, means an ordinary source.
        """
        ...


def family_of(ip: IPAddress) -> socket.AddressFamily:
    """The socket family of an address."""
    return socket.AF_INET if ip.version == 4 else socket.AF_INET6


def prepare(sock: socket.socket, keepalive: Keepalive) -> None:
    """Set what every data socket has: no delay, keepalive, non-blocking."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Off is said too: a listener that an earlier agent has prepared may have it on.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, int(keepalive.enabled))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, keepalive.time_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, keepalive.interval_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, keepalive.retries)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, keepalive.user_timeout_ms)


def hang_up(sock: socket.socket, *, finished: bool) -> None:
    """Close a socket: in order when both directions were `finished`, else with a TCP reset.

    An orderly close lets the kernel deliver what the peer has yet to read; a
    reset drops it, and tells the peer that the connection broke.
    """
    if not finished and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
    sock.close()


def peer_address(sock: socket.socket) -> SocketAddress:
    """Who is at the other end. Raises OSError (ENOTCONN) when it has gone already."""
    return SocketAddress.from_sockaddr(sock.getpeername())


def local_address(sock: socket.socket) -> SocketAddress:
    """Our end. On a captured connection: what the client dialed."""
    return SocketAddress.from_sockaddr(sock.getsockname())


async def connect(sock: socket.socket, target: SocketAddress) -> None:
    """Connect `sock`, in at most CONNECT_TIMEOUT_S.

    Raises DialError; the socket stays the caller's to close, also when
    cancelled.
    """
    address = (ip_text(target.ip), target.port)
    result = sock.connect_ex(address)
    if result == errno.EINPROGRESS:
        # Over loopback the handshake is over by the time connect(2) returns,
        # but only a second call says so; else it is EALREADY.
        result = sock.connect_ex(address)
    if result == errno.EALREADY:
        with trio.move_on_after(CONNECT_TIMEOUT_S) as scope:
            await trio.lowlevel.wait_writable(sock)
        if scope.cancelled_caught:
            result = errno.ETIMEDOUT
        else:
            result = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if result:
        reason = errno.errorcode.get(result, str(result))
        code = "connect-timeout" if result == errno.ETIMEDOUT else "connect-failed"
        raise DialError(code, f"connect to {target}: {reason}")
