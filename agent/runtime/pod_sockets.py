"""The sockets that the agent opens inside a pod's network namespace.

A socket belongs to the namespace that its thread was in at socket(2), for
life; so it is made there, and everything else is done outside. Each one is
written into socket storage by `protect` before it can send a packet: that,
and nothing that the pod could set too, tells the kernel programs that it is
ours. Listeners sit on loopback ports of the kernel's choosing; IP_TRANSPARENT
lets them take connections whose destination is the original one.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from ipaddress import IPv6Address, ip_network
from pathlib import Path
from types import MappingProxyType

from meshbpf.agent.core.address import IPAddress, SocketAddress
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.tuning import ZTUNNELS, Keepalive
from meshbpf.agent.datapath.netns import Netns
from meshbpf.agent.datapath.steering import STEER_MARK, OnAgentDown, PodSteering, Role
from meshbpf.agent.runtime import native
from meshbpf.agent.runtime.attachments import Attachment
from meshbpf.agent.runtime.sockets import family_of, prepare

FAMILIES = (socket.AF_INET, socket.AF_INET6)

# From linux/in.h and linux/in6.h; the socket module lacks some of them.
_IP_TRANSPARENT = 19
_IP_RECVORIGDSTADDR = 20
_IP_BIND_ADDRESS_NO_PORT = 24
_IPV6_RECVORIGDSTADDR = 74
_IPV6_TRANSPARENT = 75

_LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
_MAPPED = b"\0" * 10 + b"\xff\xff"
_BACKLOG_CEILING = 4096

Listeners = Mapping[tuple[Role, int], socket.socket]


class PodSockets:
    """Implements the forwarder's `SocketFactory` for one pod."""

    def __init__(
        self,
        netns: Netns,
        protect: Callable[[socket.socket], None],
        own_addresses: frozenset[IPAddress] = frozenset(),
        own_sockets_map: Callable[[], int] | None = None,
        keepalive: Keepalive = ZTUNNELS.keepalive,
    ) -> None:
        self._netns = netns
        self._own_sockets_map = own_sockets_map
        self._protect = protect
        self._keepalive = keepalive
        self.own_addresses = own_addresses
        """The pod's own: a client with one of these is not spoofed."""

    def listener(self, role: int, family: int) -> socket.socket:
        """A listening socket on a loopback port of the kernel's choosing."""
        del role  # all are made alike; who registers them tells them apart
        with self._new(family) as sock:
            bind_as(sock, (_LOOPBACK[sock.family], 0))
            listen(sock)
            return sock

    def dns_socket(self, family: int) -> socket.socket:
        """Where captured DNS queries arrive; each tells the resolver that it was for."""
        with self._new(family, socket.SOCK_DGRAM) as sock:
            self._tell_destination(sock)
            bind_as(sock, (_LOOPBACK[sock.family], 0))
            return sock

    def dns_reply(self, resolver: SocketAddress) -> socket.socket:
        """A socket that answers in the resolver's name: bound to its address and port."""
        family = family_of(resolver.ip)
        with self._new(family, socket.SOCK_DGRAM) as sock:
            _transparent(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((str(resolver.ip), resolver.port))
            return sock

    def datagram(self, family: int) -> socket.socket:
        """An unbound UDP socket for asking the resolver."""
        with self._new(family, socket.SOCK_DGRAM) as sock:
            return sock

    @staticmethod
    def _tell_destination(sock: socket.socket) -> None:
        """Have each datagram tell where it was sent to."""
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVORIGDSTADDR, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_RECVORIGDSTADDR, 1)

    def outbound(self, family: int) -> socket.socket:
        """An unbound socket for dialing out of the pod."""
        fast = self._in_one_call(family, b"")
        if fast is not None:
            return fast
        with self._new(family) as sock:
            return sock

    def to_app(self, family: int, client: IPAddress | None) -> socket.socket:
        """A socket for dialing the pod's app under the client's address.

        The mark sends the app's answers, which are addressed to that client,
        back to us instead of out of the pod; bound to lo, the dial itself
        takes the loopback path on which the reply is looked for.
        """
        own = client is None or client in self.own_addresses or client.is_loopback
        packed = b"" if own or client is None else _packed(client, family)
        fast = self._in_one_call(family, packed)
        if fast is not None:
            return fast
        with self._new(family) as sock:
            if own or client is None:
                return sock
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, STEER_MARK)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
            self._take_address(sock, client)
            return sock

    @staticmethod
    def _take_address(sock: socket.socket, client: IPAddress) -> None:
        _transparent(sock)
        # The port is chosen at connect(), when the whole tuple is known:
        # one client address may then have far more than 28,000 connections.
        sock.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
        sock.bind((_spelled(client, sock.family), 0))

    def _in_one_call(self, family: int, client: bytes) -> socket.socket | None:
        """The same from C, where that was built: a fifth of the time. None where it was not."""
        if self._own_sockets_map is None or not native.available():
            return None
        return native.pod_socket(
            self._netns.fd, family, self._own_sockets_map(), self._keepalive, client, STEER_MARK
        )

    @contextlib.contextmanager
    def _new(
        self, family: int, kind: socket.SocketKind = socket.SOCK_STREAM
    ) -> Iterator[socket.socket]:
        """A prepared socket, closed if the block fails."""
        sock = self._netns.socket(socket.AddressFamily(family), kind)
        try:
            if kind is socket.SOCK_STREAM:
                prepare(sock, self._keepalive)
            sock.setblocking(False)
            self._protect(sock)
            yield sock
        except BaseException:
            sock.close()
            raise


def open_listeners(
    sockets: PodSockets,
    inherited: Listeners = MappingProxyType({}),
    roles: Collection[Role] = tuple(Role),
) -> dict[tuple[Role, int], socket.socket]:
    """One listener per role and family; a namespace without IPv6 gets IPv4 ones alone.

    Those of DNS are there whether the pod's queries come or not: an attach may
    change that later.

    Those `inherited` from an earlier agent are used as they are, those of other
    roles closed. Blocking.
    Raises MeshbpfError; then none stays open.
    """
    opened: dict[tuple[Role, int], socket.socket] = {}
    for key, sock in inherited.items():
        if key[0] in roles:
            opened[key] = sock
        else:
            sock.close()
    try:
        for family in FAMILIES:
            try:
                for role in roles:
                    if (role, int(family)) in opened:
                        continue
                    if role is Role.DNS_UDP:
                        opened[role, family] = sockets.dns_socket(family)
                    else:
                        opened[role, family] = sockets.listener(role, family)
            except OSError as error:
                no_ipv6 = error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
                if family == socket.AF_INET6 and no_ipv6:
                    continue
                raise
    except OSError as error:
        close_all(opened)
        raise MeshbpfError(
            "listener-failed",
            f"no listener in the pod's network namespace: {error.strerror}",
            "its loopback interface must be up: `ip link set lo up` inside it",
        ) from error
    except BaseException:
        close_all(opened)
        raise
    return opened


def pod_steering(attachment: Attachment, netns: Netns, proxied: bool) -> PodSteering:
    """The attachment in the datapath's terms."""
    return PodSteering(
        key=attachment.pod,
        netns=netns,
        on_agent_down=OnAgentDown(attachment.on_agent_down),
        same_node=attachment.same_node == "kernel",
        exempt_ports=frozenset(attachment.exempt_ports),
        exempt_cidrs=tuple(map(ip_network, attachment.exempt_cidrs)),
        exempt_interfaces=frozenset(attachment.exempt_interfaces),
        dns=attachment.dns,
        proxied=proxied,
    )


def bind_as(sock: socket.socket, address: tuple[str, int]) -> None:
    """Bind, for connections to and answers from whatever address the client has asked for."""
    _transparent(sock)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind(address)


def listen(sock: socket.socket) -> None:
    """With as long a queue as the machine allows."""
    sock.listen(_backlog())


def close_all(listeners: Listeners) -> None:
    """Close each one; those that are closed already do not mind."""
    for sock in listeners.values():
        sock.close()


def _transparent(sock: socket.socket) -> None:
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)


def _packed(client: IPAddress, family: int) -> bytes:
    if family == socket.AF_INET6 and client.version == 4:
        return _MAPPED + client.packed
    return client.packed


def _spelled(client: IPAddress, family: int) -> str:
    if family == socket.AF_INET6 and client.version == 4:
        return str(IPv6Address(_MAPPED + client.packed))
    return str(client)


def _backlog() -> int:
    try:
        limit = int(Path("/proc/sys/net/core/somaxconn").read_text())
    except (OSError, ValueError):
        return _BACKLOG_CEILING
    return min(_BACKLOG_CEILING, limit)
