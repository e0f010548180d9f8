"""Two namespaces joined by a veth pair, with a real Forwarder for a pod in each.

No BPF here: capture is imitated by where the listeners are bound. The client
pod's outbound listener has the services' addresses, which sit on its lo; the
server pod's inbound listener is bound to the veth device, so that packets
from outside find it while the forwarder's own dials over lo find the app.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import trio
from cryptography import x509

from meshbpf.agent.core import ca
from meshbpf.agent.core.address import IPAddress, parse_ip
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.local_xds import parse_local_xds
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.tuning import ZTUNNELS
from meshbpf.agent.datapath.netns import Netns
from meshbpf.agent.datapath.steering import Role
from meshbpf.agent.runtime.connections import ConnectionRegistry
from meshbpf.agent.runtime.forwarder import Forwarder, LocalPod
from meshbpf.agent.runtime.sockets import prepare
from meshbpf.agent.wire.crl import Revocations, read_lists
from meshbpf.agent.wire.tls import WorkloadTls, workload_tls
from tests.revoking import crl_pem

CLIENT, CLIENT_2, SERVER = "198.18.0.1", "198.18.0.3", "198.18.0.2"
CLIENT_6, SERVER_6 = "fd00:6d62::1", "fd00:6d62::2"
HBONE_VIP, HBONE_VIP_6, PLAIN_VIP = "198.18.0.100", "fd00:6d62::100", "198.18.0.101"
PLAIN_SERVER = "198.18.0.4"
"""A workload without HBONE, in the server's namespace."""
PORT = 8080
"""The app's, and the services'."""
WEB = SpiffeId("cluster.local", "web", "client")
DB = SpiffeId("cluster.local", "db", "server")

MESH = f"""
workloads:
- uid: c
  name: client
  namespace: web
  serviceAccount: client
  workloadIps: [{CLIENT}, {CLIENT_2}, "{CLIENT_6}"]
  protocol: HBONE
  services: {{}}
- uid: s
  name: server
  namespace: db
  serviceAccount: server
  workloadIps: [{SERVER}, "{SERVER_6}"]
  protocol: HBONE
  services:
    db/hbone.db.svc: {{{PORT}: {PORT}, 81: 81}}
- uid: p
  name: outside
  namespace: db
  workloadIps: [{SERVER}]
  network: other
  services: {{}}
- uid: t
  name: plain
  namespace: db
  serviceAccount: plain
  workloadIps: [{PLAIN_SERVER}]
  protocol: TCP
  services:
    db/plain.db.svc: {{{PORT}: {PORT}}}
services:
- name: hbone
  namespace: db
  hostname: hbone.db.svc
  vips: [/{HBONE_VIP}, "/{HBONE_VIP_6}"]
  ports: {{{PORT}: {PORT}, 81: 81}}
- name: plain
  namespace: db
  hostname: plain.db.svc
  vips: [/{PLAIN_VIP}]
  ports: {{{PORT}: {PORT}}}
policies: %s
"""
DENY_WEB = """
- name: deny-web
  namespace: db
  scope: Namespace
  action: Deny
  rules: [[[{principals: [{Exact: cluster.local/ns/web/sa/client}]}]]]
"""
DENY_ALL = """
- name: deny-all
  namespace: db
  scope: Namespace
  action: Allow
  rules: []
"""


def mesh(policies: str = "[]") -> Snapshot:
    """The mesh above under these policies."""
    return Snapshot.of(parse_local_xds(MESH % policies, "rig"))


class TestIdentities:
    """Issues a certificate per identity; `renew` makes new ones."""

    def __init__(self) -> None:
        self.authority = ca.create("cluster.local", datetime.now(UTC) - timedelta(hours=1))
        self.issued: dict[SpiffeId, WorkloadTls] = {}
        self.serials: dict[SpiffeId, int] = {}
        self.revocations = Revocations()

    def renew(self) -> None:
        self.issued.clear()

    async def tls(self, identity: SpiffeId) -> WorkloadTls:
        if identity not in self.issued:
            key, now = ca.new_key(), datetime.now(UTC)
            chain = self.authority.issue(
                identity, key.public_key(), now - timedelta(minutes=1), now + timedelta(hours=1)
            )
            self.serials[identity] = x509.load_pem_x509_certificate(chain).serial_number
            self.issued[identity] = workload_tls(
                chain, key, self.authority.roots_pem, self.revocations
            )
        return self.issued[identity]

    def revoke(self, *identities: SpiffeId) -> int:
        """A list of the newest certificates of these comes in; how many tunnels it ended."""
        serials = [self.serials[identity] for identity in identities]
        content = crl_pem(self.authority.issuer, self.authority.key, *serials)
        return self.revocations.replace(read_lists(content, "rig"))


@dataclass
class Sockets:
    """A SocketFactory that leaves the source alone."""

    netns: Netns

    def listener(self, role: int, family: int) -> socket.socket:
        raise NotImplementedError

    def outbound(self, family: int) -> socket.socket:
        sock = self.netns.socket(family, socket.SOCK_STREAM)
        prepare(sock, ZTUNNELS.keepalive)
        return sock

    def to_app(self, family: int, client: IPAddress | None) -> socket.socket:
        del client
        return self.outbound(family)


@dataclass
class Side:
    """One pod with its forwarder."""

    netns: Netns
    pod: LocalPod
    forwarder: Forwarder
    connections: ConnectionRegistry
    listeners: dict[tuple[Role, int], socket.socket]
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)

    async def run(self) -> None:
        with self.scope:
            await self.forwarder.serve(self.pod, self.listeners)
        self.ended.set()


@dataclass
class Rig:
    """Both sides; `state` is what the mesh is now."""

    client: Side
    server: Side
    identities: TestIdentities
    state: list[Snapshot]

    def listen(self, port: int = PORT, ip: str = SERVER, backlog: int = 100) -> trio.SocketListener:
        """An app in the server pod."""
        return trio.SocketListener(trio.socket.from_stdlib_socket(self.app(port, ip, backlog)))

    def app(self, port: int = PORT, ip: str = SERVER, backlog: int = 100) -> socket.socket:
        return listening(self.server.netns, ip, port, backlog)

    async def dial(
        self, ip: str = HBONE_VIP, port: int = PORT, source: str = ""
    ) -> trio.SocketStream:
        """A client of the client pod."""
        return await dial(self.client.netns, ip, port, source or client_ip(ip))

    @asynccontextmanager
    async def joined(
        self, listener: trio.SocketListener | None = None, *, vip: str = HBONE_VIP, source: str = ""
    ) -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream]]:
        """A client's stream through HBONE and the app's end of it."""
        listening_here = listener or self.listen()
        try:
            async with await self.dial(vip, source=source) as client:
                with trio.fail_after(5):
                    app = await listening_here.accept()
                async with app:
                    yield client, app
        finally:
            if listener is None:
                await listening_here.aclose()

    async def dial_server(self, port: int = PORT) -> trio.SocketStream:
        """A client from outside that comes to the server pod without a tunnel."""
        return await dial(self.client.netns, SERVER, port, CLIENT)

    def set_policies(self, policies: str) -> int:
        """A new state; how many connections it cut."""
        self.state[0] = mesh(policies)
        return self.server.connections.recheck(self.state[0])


async def read_all(stream: trio.SocketStream) -> bytes:
    """Everything up to the FIN."""
    return b"".join([chunk async for chunk in stream])


def reset(stream: trio.SocketStream) -> None:
    """Break the connection with an RST."""
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


async def expect_reset(stream: trio.SocketStream, within_s: float = 2.0) -> None:
    """Read on until the connection breaks; it must not end in order."""
    try:
        with trio.fail_after(within_s):
            while await stream.receive_some(65536):
                pass
    except trio.BrokenResourceError as broken:
        cause = broken.__cause__
        if isinstance(cause, OSError) and cause.errno == errno.ECONNRESET:
            return
        raise
    raise AssertionError("the stream ended in order")


def client_ip(target: str) -> str:
    return CLIENT_6 if ":" in target else CLIENT


async def dial(netns: Netns, ip: str, port: int, source: str) -> trio.SocketStream:
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    sock = trio.socket.from_stdlib_socket(netns.socket(family, socket.SOCK_STREAM))
    try:
        await sock.bind((source, 0))
        await sock.connect((ip, port))
    except BaseException:
        sock.close()
        raise
    return trio.SocketStream(sock)


def listening(
    netns: Netns, ip: str, port: int, backlog: int = 4096, device: bytes = b""
) -> socket.socket:
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    sock = netns.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if device:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)
    sock.setblocking(False)
    sock.bind((ip, port))
    sock.listen(backlog)
    return sock


@contextmanager
def namespaces() -> Iterator[tuple[Netns, Netns]]:
    """A client's and a server's namespace, joined."""
    names = [f"fw-{os.getpid()}-{side}" for side in "cs"]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip(
            "-n",
            names[0],
            "link",
            "add",
            "v0",
            "type",
            "veth",
            "peer",
            "name",
            "v0",
            "netns",
            names[1],
        )
        own = [(CLIENT, CLIENT_2, CLIENT_6), (SERVER_6,)]
        # The server's address sits on lo too: a dial from inside then arrives
        # by lo, where a listener bound to v0 does not see it.
        vips = [(HBONE_VIP, HBONE_VIP_6, PLAIN_VIP), (SERVER, PLAIN_SERVER)]
        for name, addresses, local in zip(names, own, vips, strict=True):
            _ip("-n", name, "link", "set", "lo", "up")
            for address in addresses:
                _ip("-n", name, "addr", "add", _prefixed(address), "dev", "v0", *_nodad(address))
            for address in local:
                _ip("-n", name, "addr", "add", _prefixed(address), "dev", "lo", *_nodad(address))
            _ip("-n", name, "link", "set", "v0", "up")
        for name, there in zip(names, ((SERVER_6, *vips[1]), own[0]), strict=True):
            for address in there:
                _ip("-n", name, "route", "add", _prefixed(address), "dev", "v0")
        opened = [Netns.open(name) for name in names]
        try:
            yield opened[0], opened[1]
        finally:
            for netns in opened:
                netns.close()
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@asynccontextmanager
async def forwarding(spaces: tuple[Netns, Netns]) -> AsyncIterator[Rig]:
    """Both forwarders, running."""
    identities, state = TestIdentities(), [mesh()]
    client = _side(spaces[0], identities, state, "web", "client", (CLIENT, CLIENT_2, CLIENT_6))
    server = _side(spaces[1], identities, state, "db", "server", (SERVER, SERVER_6))
    v4, v6 = socket.AF_INET, socket.AF_INET6
    # Roles and families are the only keys; one more listener for the second
    # VIP takes the place of a role that the client pod does not need here.
    client.listeners[Role.OUTBOUND, v4] = listening(spaces[0], HBONE_VIP, PORT)
    client.listeners[Role.OUTBOUND, v6] = listening(spaces[0], HBONE_VIP_6, PORT)
    client.listeners[Role.OUTBOUND, -1] = listening(spaces[0], PLAIN_VIP, PORT)
    client.listeners[Role.OUTBOUND, -2] = listening(spaces[0], HBONE_VIP, 81)
    server.listeners[Role.HBONE, v4] = listening(spaces[1], SERVER, 15008)
    server.listeners[Role.HBONE, v6] = listening(spaces[1], SERVER_6, 15008)
    server.listeners[Role.INBOUND, v4] = listening(spaces[1], SERVER, 9000, device=b"v0")
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run)
            nursery.start_soon(server.run)
            yield Rig(client, server, identities, state)
            nursery.cancel_scope.cancel()
    finally:
        for side in (client, server):
            for listener in side.listeners.values():
                listener.close()


def _side(
    netns: Netns,
    identities: TestIdentities,
    state: list[Snapshot],
    namespace: str,
    name: str,
    addresses: tuple[str, ...],
) -> Side:
    connections = ConnectionRegistry()
    return Side(
        netns=netns,
        pod=LocalPod(namespace, name, name, frozenset(map(parse_ip, addresses)), Sockets(netns)),
        forwarder=Forwarder(lambda: state[0], identities, connections),
        connections=connections,
        listeners={},
    )


def _prefixed(address: str) -> str:
    return f"{address}/{128 if ':' in address else 32}"


def _nodad(address: str) -> tuple[str, ...]:
    return ("nodad",) if ":" in address else ()


def _ip(*words: str) -> None:
    family = ["-6"] if any(":" in word for word in words) else []
    subprocess.run(["ip", *family, *words], check=True, capture_output=True, text=True)
