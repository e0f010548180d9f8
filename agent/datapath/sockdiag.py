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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from meshbpf.agent.datapath import rtnetlink
from meshbpf.agent.datapath.codecs import IPAddress
from meshbpf.agent.datapath.flowcodecs import Flow
from meshbpf.agent.datapath.netlink import Netlink, NetlinkError, attributes, nested, u32
from meshbpf.agent.datapath.netns import Netns
from meshbpf.bpf import AGENT_MARK, STEER_MARK, STEER_MASK

# Names of include/uapi/linux/{sock_diag,inet_diag}.h.
_SOCK_DIAG_BY_FAMILY: Final = 20
_SOCK_DESTROY: Final = 21
_INET_DIAG_INFO: Final = 2
_INET_DIAG_MARK: Final = 15
_INET_DIAG_SK_BPF_STORAGES: Final = 20
_INET_DIAG_REQ_SK_BPF_STORAGES: Final = 2
_SK_DIAG_BPF_STORAGE_REQ_MAP_FD: Final = 1
_NETLINK_SOCK_DIAG: Final = 4

# All but LISTEN (10), CLOSE (7) and TIME_WAIT (6): those hold no connection.
_STATES: Final = 0xFFF & ~(1 << 10 | 1 << 7 | 1 << 6 | 1)

_ANY_STATE: Final = 0xFFFFFFFF
_WITH_INFO: Final = 1 << _INET_DIAG_INFO - 1

_ID_BYTES: Final = 48
_COOKIE_AT: Final = 40  # in struct inet_diag_sockid
_TCP_INFO_BYTES_AT: Final = 120  # tcpi_bytes_acked, tcpi_bytes_received (linux/tcp.h)
_ROUNDS: Final = 4
_FEW: Final = 256


@dataclass(frozen=True, slots=True)
class _Connection:
    family: int
    identity: bytes  # struct inet_diag_sockid with the socket's cookie
    local: IPAddress
    mark: int
    captured: bool


def _request(family: int, states: int, identity: bytes, extensions: int = 0) -> bytes:
    """An inet_diag_req_v2."""
    return struct.pack("BBBBI", family, socket.IPPROTO_TCP, extensions, 0, states) + identity


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


@dataclass(frozen=True, slots=True)
class SocketBytes:
    """What one TCP socket has carried; `acked` and `received` as the kernel counts them."""

    acked: int
    received: int


def sample(netns: Netns, flows: Sequence[tuple[Flow, int]]) -> dict[int, SocketBytes]:
    """What these connections have carried, by the cookie of the socket inside; not those gone.

    A dump walks the hash table of the whole machine, so few sockets are asked
    for one by one.
    """
    found = {}
    with Netlink(netns, _NETLINK_SOCK_DIAG) as nl:
        replies = _one_by_one(nl, flows) if len(flows) <= _FEW else _dumped(nl)
        for reply in replies:
            info = attributes(reply[72:]).get(_INET_DIAG_INFO, b"")
            if len(info) >= _TCP_INFO_BYTES_AT + 16:
                acked, received = struct.unpack_from("QQ", info, _TCP_INFO_BYTES_AT)
                (cookie,) = struct.unpack_from("Q", reply, 4 + _COOKIE_AT)
                found[cookie] = SocketBytes(acked, received)
    return found


def _one_by_one(nl: Netlink, flows: Iterable[tuple[Flow, int]]) -> Iterator[bytes]:
    for flow, cookie in flows:
        for family, identity in _identities(flow, cookie):
            try:
                body = _request(family, _ANY_STATE, identity, _WITH_INFO)
                yield nl.get(_SOCK_DIAG_BY_FAMILY, body, "look at a connection")
            except NetlinkError as error:
                if error.errno not in (errno.ENOENT, errno.ESTALE):
                    raise
            else:
                break


def _dumped(nl: Netlink) -> Iterator[bytes]:
    for family in (socket.AF_INET, socket.AF_INET6):
        body = _request(family, _STATES, bytes(_ID_BYTES), _WITH_INFO)
        yield from nl.dump(_SOCK_DIAG_BY_FAMILY, body, "list TCP connections")


def _identities(flow: Flow, cookie: int) -> Iterator[tuple[int, bytes]]:
    """Family and inet_diag_sockid of a flow's two ends: the client's socket, the server's."""
    ends = (flow.source, flow.destination)
    for local, remote in (ends, ends[::-1]):
        yield (
            socket.AF_INET if local.ip.version == 4 else socket.AF_INET6,
            struct.pack(">HH", local.port, remote.port)
            + local.ip.packed.ljust(16, b"\0")
            + remote.ip.packed.ljust(16, b"\0")
            + struct.pack("=IQ", 0, cookie),
        )


def destroy(netns: Netns, flows: Iterable[tuple[Flow, int]]) -> int:
    """End connections that have an end inside, given with that socket's cookie.

    The cookie is what makes this safe: the kernel looks the four numbers up as
    it does for a packet, and once the connection is gone that finds a listener.
    Both directions are tried, for the end inside may be the client or the server.
    """
    ended = 0
    with Netlink(netns, _NETLINK_SOCK_DIAG) as nl:
        for flow, cookie in flows:
            for family, identity in _identities(flow, cookie):
                body = _request(family, _ANY_STATE, identity)
                try:
                    nl.do(_SOCK_DESTROY, body, "end a connection")
                except NetlinkError as error:
                    if error.errno not in (errno.ENOENT, errno.ESTALE):
                        raise
                else:
                    ended += 1
                    break
    return ended


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
