"""Sockets in a pod that Istio's node agent captures with its own rules.

Its iptables rules redirect to ztunnel's ports and leave alone what carries
ztunnel's mark; so we listen and mark as ztunnel does (src/inpod/config.rs). The
original destination is the connection tracker's to tell, and the answers to a
client whose address we take on come back by its connection mark.
"""

from __future__ import annotations

import os
import socket
import struct

from meshbpf.agent.core.address import IPAddress, SocketAddress
from meshbpf.agent.core.tuning import Keepalive
from meshbpf.agent.datapath.netns import Netns
from meshbpf.agent.datapath.proxy_sockets import PROXY_PORTS
from meshbpf.agent.datapath.steering import Role
from meshbpf.agent.runtime.pod_sockets import PodSockets, bind_as, listen
from meshbpf.agent.runtime.sockets import local_address
from meshbpf.bpf import AGENT_MARK

DNS_PORT = 15053
_PORTS = {role: port for port, role in PROXY_PORTS.items()} | {Role.DNS: DNS_PORT}
_ANY = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}
_LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
_SO_MARK = 36  # asm-generic/socket.h
_SO_ORIGINAL_DST = 80  # linux/netfilter_ipv4.h, and IP6T_SO_ORIGINAL_DST


class InpodSockets(PodSockets):
    """Implements the forwarder's `SocketFactory` for a pod behind Istio's rules."""

    def __init__(
        self, netns: Netns, own_addresses: frozenset[IPAddress], keepalive: Keepalive
    ) -> None:
        super().__init__(netns, _mark, own_addresses, keepalive=keepalive)
        self._dns: dict[int, socket.socket] = {}

    def listener(self, role: int, family: int) -> socket.socket:
        """Where the rules redirect connections of this role to."""
        with self._new(family) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            where = _LOOPBACK if role == Role.DNS else _ANY
            bind_as(sock, (where[sock.family], _PORTS[Role(role)]))
            listen(sock)
            return sock

    def dns_socket(self, family: int) -> socket.socket:
        """Where the rules redirect DNS queries to."""
        with self._new(family, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            self._tell_destination(sock)
            bind_as(sock, (_LOOPBACK[sock.family], DNS_PORT))
            self._dns[family] = sock
            return sock

    def dns_reply(self, resolver: SocketAddress) -> socket.socket:
        """The listening socket itself: the tracker turns its address into the resolver's."""
        family = socket.AF_INET if resolver.ip.version == 4 else socket.AF_INET6
        return socket.socket(fileno=os.dup(self._dns[family].fileno()))

    def to_app(self, family: int, client: IPAddress | None) -> socket.socket:
        """A socket for dialing the pod's app under the client's address."""
        with self._new(family) as sock:
            if client is not None and client not in self.own_addresses and not client.is_loopback:
                self._take_address(sock, client)
            return sock


def original_destination(sock: socket.socket) -> SocketAddress:
    """What the client dialed, before a rule redirected it here."""
    level, size = (
        (socket.IPPROTO_IPV6, 28) if sock.family == socket.AF_INET6 else (socket.IPPROTO_IP, 16)
    )
    try:
        raw = sock.getsockopt(level, _SO_ORIGINAL_DST, size)
    except OSError:
        return local_address(sock)  # nobody has tracked it: it was not redirected
    (port,) = struct.unpack_from("!H", raw, 2)
    packed = raw[4:8] if sock.family == socket.AF_INET else raw[8:24]
    return SocketAddress.from_sockaddr((socket.inet_ntop(sock.family, packed), port))


def _mark(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, _SO_MARK, AGENT_MARK)
