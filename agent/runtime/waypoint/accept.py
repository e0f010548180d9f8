"""The HBONE listeners: several workers share the port, and the kernel deals the connections."""

from __future__ import annotations

import errno
import socket
from collections.abc import Awaitable, Callable

import trio

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.tuning import ZTUNNELS
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.runtime.sockets import prepare
from meshbpf.agent.runtime.tasks import guarded

log = Log("waypoint")

_BACKLOG = 1024
_BATCH = 32
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_EXHAUSTED_WAIT_S = 0.1


def open_hbone(port: int) -> list[socket.socket]:
    """A listener for each address family that this network namespace has."""
    found: list[socket.socket] = []
    for family, address in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):
        try:
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            if error.errno == errno.EAFNOSUPPORT:
                continue
            raise
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            prepare(sock, ZTUNNELS.keepalive)
            sock.bind((address, port))
            sock.listen(_BACKLOG)
        except OSError as error:
            sock.close()
            if error.errno == errno.EADDRNOTAVAIL:
                continue  # disable_ipv6
            for one in found:
                one.close()
            raise MeshbpfError(
                "port-in-use",
                f"HBONE port {port}: {error.strerror}",
                f"`ss -ltnp sport = :{port}` says who has it",
            ) from error
        found.append(sock)
    if not found:
        raise MeshbpfError("no-ip", "this network namespace has no address family to listen on")
    return found


async def accept(
    nursery: trio.Nursery,
    listener: socket.socket,
    handle: Callable[[socket.socket], Awaitable[None]],
) -> None:
    """Accept until cancelled; each connection has a task of its own."""
    while True:
        await trio.lowlevel.wait_readable(listener)
        for _ in range(_BATCH):
            try:
                sock, _address = listener.accept()
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    log.error("cannot accept, connections wait in the queue", cause=error)
                    await trio.sleep(_EXHAUSTED_WAIT_S)
                    break
                continue  # it broke while it was queued; the next may be fine
            sock.setblocking(False)
            nursery.start_soon(guarded, handle, sock)
