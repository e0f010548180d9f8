"""Ending TCP connections of a pod's netns from outside, by sock_diag.

A detach takes away what keeps captured flows inside the pod: once the policy
rule and the TC program are gone, the next segment of such a flow would leave
in the clear towards an address where nobody knows the connection. They are
therefore ended first. Which they are, the kernel can say without us keeping
a list: their sockets carry the steering mark, or, where TC captured them,
the `captured` socket storage, which a sock_diag dump shows on request; or they
are the agent's ends of outbound connections, which have the agent's mark and
an address that is not of this netns.
"""

from __future__ import annotations

import errno
import socket
import struct
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from meshbpf.agent.datapath import rtnetlink
from meshbpf.agent.datapath.codecs import IPAddress
from meshbpf.agent.datapath.netlink import Netlink, NetlinkError, attributes, nested, u32
from meshbpf.agent.datapath.netns import Netns
from meshbpf.bpf import AGENT_MARK, STEER_MARK, STEER_MASK

# Names of include/uapi/linux/{sock_diag,inet_diag}.h.
_SOCK_DIAG_BY_FAMILY: Final = 20
_SOCK_DESTROY: Final = 21
_INET_DIAG_MARK: Final = 15
_INET_DIAG_SK_BPF_STORAGES: Final = 20
_INET_DIAG_REQ_SK_BPF_STORAGES: Final = 2
_SK_DIAG_BPF_STORAGE_REQ_MAP_FD: Final = 1
_NETLINK_SOCK_DIAG: Final = 4

# All but LISTEN (10), CLOSE (7) and TIME_WAIT (6): those hold no connection.
_STATES: Final = 0xFFF & ~(1 << 10 | 1 << 7 | 1 << 6 | 1)

_ID_BYTES: Final = 48
_ROUNDS: Final = 4


@dataclass(frozen=True, slots=True)
class _Connection:
    family: int
    identity: bytes  # struct inet_diag_sockid with the socket's cookie
    local: IPAddress
    mark: int
    captured: bool


def _request(family: int, states: int, identity: bytes) -> bytes:
    return struct.pack("BBBBI", family, socket.IPPROTO_TCP, 0, 0, states) + identity


def _connections(nl: Netlink, captured_map_fd: int) -> list[_Connection]:
    wanted = nested(
        _INET_DIAG_REQ_SK_BPF_STORAGES, u32(_SK_DIAG_BPF_STORAGE_REQ_MAP_FD, captured_map_fd)
    )
    found = []
    for family in (socket.AF_INET, socket.AF_INET6):
        body = _request(family, _STATES, bytes(_ID_BYTES)) + wanted
        for reply in nl.dump(_SOCK_DIAG_BY_FAMILY, body, "list TCP connections"):
            parts = attributes(reply[72:])
            mark = parts.get(_INET_DIAG_MARK)
            found.append(
                _Connection(
                    family=reply[0],
                    identity=reply[4 : 4 + _ID_BYTES],
                    local=ip_address(reply[8 : 8 + (4 if family == socket.AF_INET else 16)]),
                    mark=0 if mark is None else struct.unpack("I", mark)[0],
                    captured=bool(attributes(parts.get(_INET_DIAG_SK_BPF_STORAGES, b""))),
                )
            )
    return found


def destroy_steered(netns: Netns, captured_map_fd: int) -> int:
    """End every connection that steering took inside; how many ended.

    Both ends see a reset. A socket that ends meanwhile by itself is no error.
    NetlinkError EOPNOTSUPP on a kernel without CONFIG_INET_DIAG_DESTROY.
    """
    with rtnetlink.route(netns) as nl:
        own = {one.ip for one in rtnetlink.addresses(nl)}

    def is_steered(one: _Connection) -> bool:
        return (
            one.captured
            or one.mark & STEER_MASK == STEER_MARK
            or (one.mark == AGENT_MARK and one.local not in own)
        )

    ended = 0
    with Netlink(netns, _NETLINK_SOCK_DIAG) as nl:
        # A connection accepted while we list shows up in the next round.
        for _ in range(_ROUNDS):
            steered = list(filter(is_steered, _connections(nl, captured_map_fd)))
            if not steered:
                break
            for one in steered:
                try:
                    body = _request(one.family, 1 << 1, one.identity)
                    nl.do(_SOCK_DESTROY, body, "end a connection")
                except NetlinkError as error:
                    if error.errno not in (errno.ENOENT, errno.ESTALE):
                        raise
                else:
                    ended += 1
    return ended
