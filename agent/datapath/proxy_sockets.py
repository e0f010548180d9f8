"""The listeners that a stock proxy has opened in a pod's network namespace.

sock_diag lists the namespace's listeners with their inode numbers and the
cgroup that each was made in; the proxy's /proc/PID/fd says which of them are
its own; pidfd_getfd(2) makes a copy of the descriptor, by which a listener
gets into the map that sk_lookup reads. The map follows the socket, not the
copy, which is to be closed at once: when the proxy ends, so do its slots.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.datapath.netlink import Netlink, attributes
from meshbpf.agent.datapath.netns import Netns
from meshbpf.agent.datapath.steering_types import Listeners
from meshbpf.bpf import HBONE_PORT, Role

PROXY_PORTS: Final[Mapping[int, Role]] = {
    15001: Role.OUTBOUND,
    15006: Role.INBOUND,
    HBONE_PORT: Role.HBONE,
}
"""Where ztunnel listens in a pod (src/config.rs)."""

# Names of include/uapi/linux/{sock_diag,inet_diag}.h.
_SOCK_DIAG_BY_FAMILY: Final = 20
_NETLINK_SOCK_DIAG: Final = 4
_INET_DIAG_CGROUP_ID: Final = 21
_LISTEN: Final = 1 << 10
_ID_BYTES: Final = 48
_INODE_AT: Final = 68  # in struct inet_diag_msg
_MESSAGE_BYTES: Final = 72
_SYS_PIDFD_GETFD: Final = 438  # asm-generic/unistd.h
_SO_NETNS_COOKIE: Final = 71
_IP_TRANSPARENT: Final = 19  # linux/in.h
_libc: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class ProxySockets:
    """Copies of a proxy's listeners, the caller's to close, and the cgroup it runs in (v2 id)."""

    listeners: Listeners
    cgroup: int


def proxy_sockets(netns: Netns, pid: int) -> ProxySockets:
    """What process `pid` listens on in `netns`, by role and family. Blocking.

    A dual-stack listener stands for both families. Raises MeshbpfError when a
    role has no listener, or the process is out of our sight.
    """
    found = _listening(netns)
    listeners: dict[tuple[Role, int], socket.socket] = {}
    cgroups = set()
    with ExitStack() as stack:
        try:
            pidfd = os.pidfd_open(pid)
            stack.callback(os.close, pidfd)
            for fd, inode in _sockets_of(pid):
                if inode not in found:
                    continue
                role, cgroup = found[inode]
                sock = _copy(pidfd, fd)
                if sock is None:
                    continue
                stack.callback(sock.close)
                if not _is_listener_in(sock, netns):
                    sock.close()  # the number was given to another meanwhile
                    continue
                for family in _families(sock):
                    listeners[role, family] = sock
                cgroups.add(cgroup)
        except OSError as error:
            raise MeshbpfError(
                "proxy-out-of-sight",
                f"the descriptors of process {pid} cannot be had: {error.strerror}",
                "the agent needs the host's PID namespace (hostPID) and CAP_SYS_PTRACE",
            ) from error
        missing = {role.name.lower() for role in PROXY_PORTS.values()} - {
            role.name.lower() for role, _family in listeners
        }
        if missing:
            raise MeshbpfError(
                "proxy-not-listening",
                f"process {pid} has no listener for {', '.join(sorted(missing))} in {netns.path}",
                "its log says why it could not open them",
            )
        for (role, _family), sock in listeners.items():
            # What it accepts has the original destination for its own address.
            if role is not Role.HBONE:
                sock.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
        stack.pop_all()
    return ProxySockets(listeners, cgroups.pop())


def _listening(netns: Netns) -> dict[int, tuple[Role, int]]:
    """Role and cgroup of each listener on one of the ports, by inode."""
    found = {}
    with Netlink(netns, _NETLINK_SOCK_DIAG) as nl:
        for family in (socket.AF_INET, socket.AF_INET6):
            body = struct.pack("BBBBI", family, socket.IPPROTO_TCP, 0, 0, _LISTEN)
            for reply in nl.dump(_SOCK_DIAG_BY_FAMILY, body + bytes(_ID_BYTES), "list listeners"):
                (port,) = struct.unpack_from(">H", reply, 4)
                (inode,) = struct.unpack_from("I", reply, _INODE_AT)
                cgroup = attributes(reply[_MESSAGE_BYTES:]).get(_INET_DIAG_CGROUP_ID)
                if port in PROXY_PORTS and cgroup is not None:
                    found[inode] = PROXY_PORTS[port], struct.unpack("Q", cgroup)[0]
    return found


def _sockets_of(pid: int) -> list[tuple[int, int]]:
    """Descriptor and inode of each socket of a process."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            kind, _, rest = str(entry.readlink()).partition(":[")
        except FileNotFoundError:
            continue  # closed meanwhile
        if kind == "socket":
            found.append((int(entry.name), int(rest.rstrip("]"))))
    return found


def _copy(pidfd: int, fd: int) -> socket.socket | None:
    """None when it was closed meanwhile."""
    copied = _libc.syscall(_SYS_PIDFD_GETFD, pidfd, fd, 0)
    if copied < 0:
        number = ctypes.get_errno()
        if number == errno.EBADF:
            return None
        raise OSError(number, os.strerror(number))
    return socket.socket(fileno=copied)


def _is_listener_in(sock: socket.socket, netns: Netns) -> bool:
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return False
    raw = sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
    return bool(struct.unpack("Q", raw)[0] == netns.cookie)


def _families(sock: socket.socket) -> tuple[int, ...]:
    if sock.family != socket.AF_INET6:
        return (int(sock.family),)
    if sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
        return (int(socket.AF_INET6),)
    return int(socket.AF_INET), int(socket.AF_INET6)
