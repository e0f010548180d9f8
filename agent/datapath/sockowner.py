"""Who has the other end of a connection on this machine: its user, by sock_diag.

For a TCP connection over loopback, the client's socket is in our own netns,
and the kernel tells its owner to anyone who asks with all four numbers. That
is as good as SO_PEERCRED is for unix sockets, with one trap: a socket that
its process has closed already has no owner any more, and the kernel then says
uid 0. Such an orphan shows inode 0, and is nobody here.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import Final

from meshbpf.agent.core.address import SocketAddress
from meshbpf.agent.datapath.netlink import Netlink, NetlinkError

# struct inet_diag_req_v2 and inet_diag_msg of include/uapi/linux/inet_diag.h.
_SOCK_DIAG_BY_FAMILY: Final = 20
_NETLINK_SOCK_DIAG: Final = 4
_ANY_STATE: Final = 0xFFFFFFFF
_NO_COOKIE: Final = b"\xff" * 8
_UID_AND_INODE: Final = struct.Struct("II")
_UID_AT: Final = 64


def owner_of(client: SocketAddress, server: SocketAddress) -> int | None:
    """The uid that owns the socket at `client`, connected to `server`, in this netns.

    None when there is no such socket, or nobody owns it any more. NetlinkError
    when the kernel cannot tell (no inet_diag module).
    """
    family = socket.AF_INET if client.ip.version == 4 else socket.AF_INET6
    identity = (
        struct.pack(">HH", client.port, server.port)
        + client.ip.packed.ljust(16, b"\0")
        + server.ip.packed.ljust(16, b"\0")
        + struct.pack("I", 0)
        + _NO_COOKIE
    )
    body = struct.pack("BBBBI", family, socket.IPPROTO_TCP, 0, 0, _ANY_STATE) + identity
    with Netlink(None, _NETLINK_SOCK_DIAG) as nl:
        try:
            reply = nl.get(_SOCK_DIAG_BY_FAMILY, body, "find the owner of a connection")
        except NetlinkError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
    uid, inode = _UID_AND_INODE.unpack_from(reply, _UID_AT)
    return uid if inode else None
