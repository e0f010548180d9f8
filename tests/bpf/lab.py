"""Three namespaces for steering: a host, and two pods routed to it by veth.

Everything is tagged `st`. The host namespace stands for a node: the test's
own thread lives in it (`in_host`), so that "the agent's netns" is not the
machine's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from pathlib import Path

from meshbpf.agent.datapath.mounts import mounts_of
from meshbpf.agent.datapath.netns import Netns
from meshbpf.agent.datapath.steering import Role, Steering

TAG = os.environ.get("MESHBPF_TESTBED_TAG", "st")
HOST, POD, PEER = f"{TAG}-host", f"{TAG}-p1", f"{TAG}-p2"
HOST_V4, POD_V4, PEER_V4 = "198.18.40.1", "198.18.41.1", "198.18.41.2"
HOST_V6, POD_V6, PEER_V6 = "fd00:6d62:41::ff", "fd00:6d62:41::1", "fd00:6d62:41::2"
MESH_V4, MESH_V6 = "198.19.1.1", "fd00:6d62:19::1"  # nobody has these
MESH = tuple(map(ip_network, ("198.19.0.0/16", "fd00:6d62:19::/48")))
PEER_IN_MESH = tuple(map(ip_network, (f"{PEER_V4}/32", f"{PEER_V6}/128")))
APP_PORT = 80
# /sys/fs/cgroup where version 2 is alone, a folder in it where both are mounted.
CGROUP2 = next(mount.point for mount in mounts_of() if mount.kind == "cgroup2")

SO_MARK = 36
IP_TRANSPARENT, IPV6_TRANSPARENT = 19, 75
IPPROTO_MPTCP = 262


def run(*argv: str) -> str:
    """A command that must succeed; its output."""
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=10).stdout


def ip(netns: str, *argv: str) -> str:
    return run("ip", "-n", netns, *argv)


def sysctl(netns: str, name: str, value: str) -> None:
    with opened(netns) as one, one.entered():
        Path("/proc/sys", *name.split("/")).write_text(value)


@contextlib.contextmanager
def opened(name: str | Path) -> Iterator[Netns]:
    netns = Netns.open(name)
    try:
        yield netns
    finally:
        netns.close()


def _no_dad(name: str) -> None:
    """Link-local addresses are usable at once: neighbours are asked from them."""
    sysctl(name, "net/ipv6/conf/default/accept_dad", "0")


def add_pod(name: str, number: int, host: str = HOST) -> None:
    """A namespace with eth0, one address of each family, and routes both ways."""
    v4, v6, veth = f"198.18.41.{number}", f"fd00:6d62:41::{number}", f"{TAG}v{number}"
    run("ip", "netns", "add", name)
    _no_dad(name)
    ip(name, "link", "set", "lo", "up")
    run("ip", "link", "add", veth, "netns", host, "type", "veth", "peer", "eth0", "netns", name)
    ip(name, "addr", "add", f"{v4}/32", "dev", "eth0")
    ip(name, "addr", "add", f"{v6}/128", "dev", "eth0", "nodad")
    ip(name, "link", "set", "eth0", "up")
    ip(host, "link", "set", veth, "up")
    ip(host, "addr", "add", f"{HOST_V4}/32", "dev", veth)
    ip(host, "addr", "add", f"{HOST_V6}/128", "dev", veth, "nodad")
    ip(name, "route", "add", HOST_V4, "dev", "eth0")
    ip(name, "route", "add", "default", "via", HOST_V4, "dev", "eth0")
    ip(name, "-6", "route", "add", HOST_V6, "dev", "eth0")
    ip(name, "-6", "route", "add", "default", "via", HOST_V6, "dev", "eth0")
    ip(host, "route", "add", f"{v4}/32", "dev", veth)
    ip(host, "-6", "route", "add", f"{v6}/128", "dev", veth)


def remove(name: str) -> None:
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False, timeout=10)


def remove_pod(name: str, number: int, host: str = HOST) -> None:
    """As a CNI does it: the veth pair first, whose end with the namespace may take long."""
    argv = ["ip", "-n", host, "link", "del", f"{TAG}v{number}"]
    subprocess.run(argv, capture_output=True, check=False, timeout=10)
    remove(name)


def add_host(name: str = HOST) -> None:
    run("ip", "netns", "add", name)
    _no_dad(name)
    ip(name, "link", "set", "lo", "up")
    sysctl(name, "net/ipv4/ip_forward", "1")
    sysctl(name, "net/ipv6/conf/all/forwarding", "1")


# --- sockets -------------------------------------------------------------------


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def transparent(sock: socket.socket) -> None:
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)


def dial(
    netns: Netns,
    address: str,
    port: int = APP_PORT,
    *,
    protocol: int = 0,
    mark: int = 0,
    device: str = "",
    options: bytes = b"",
    timeout_s: float = 2.0,
) -> str:
    """Connect, say hello, and return the answer; an errno's name when refused."""
    with netns.socket(family_of(address), socket.SOCK_STREAM, protocol) as sock:
        sock.settimeout(timeout_s)
        if mark:
            sock.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
        if device:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        if options:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, options)
        try:
            sock.connect((address, port))
            sock.sendall(b"hello")
            return sock.recv(200).decode() or "EOF"
        except TimeoutError:
            return "ETIMEDOUT"
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error))


def spoken(address: tuple[str, int]) -> str:
    unmapped = ip_address(address[0])
    mapped = getattr(unmapped, "ipv4_mapped", None)
    return f"{mapped or unmapped}"


@contextlib.contextmanager
def app(netns: Netns, name: str, port: int = APP_PORT) -> Iterator[None]:
    """An application on [::]:port that answers `app NAME saw CLIENT`."""
    listener = netns.socket(socket.AF_INET6, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("::", port))
    listener.listen(64)

    def answer(sock: socket.socket, client: tuple[str, int]) -> None:
        sock.recv(100)
        sock.sendall(f"app {name} saw {spoken(client)}".encode())

    with _served(listener, answer):
        yield


def _loop(listener: socket.socket, answer: object, stop: threading.Event) -> None:
    assert callable(answer)
    while not stop.is_set():
        try:
            sock, client = listener.accept()
        except OSError:
            return  # shut down
        with sock, contextlib.suppress(OSError):
            sock.settimeout(2)
            answer(sock, client)


def _end(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)  # wakes accept(), which close() does not
    listener.close()


@contextlib.contextmanager
def _served(listener: socket.socket, answer: object) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=_loop, args=(listener, answer, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        _end(listener)
        thread.join(3)


# --- a tiny agent ----------------------------------------------------------------


def open_listeners(netns: Netns) -> dict[tuple[Role, int], socket.socket]:
    """As the forwarder makes them: transparent, on loopback ports of the kernel's choosing."""
    made = {}
    for role in Role:
        for family, loopback in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            udp = role is Role.DNS_UDP
            sock = netns.socket(family, socket.SOCK_DGRAM if udp else socket.SOCK_STREAM)
            transparent(sock)
            sock.bind((loopback, 0))
            if not udp:
                sock.listen(64)
            made[role, int(family)] = sock
    return made


def dial_app(netns: Netns, steering: Steering, client: str, target: tuple[str, int]) -> str:
    """What the agent's inbound side does: dial the app under the client's address."""
    with netns.socket(family_of(client), socket.SOCK_STREAM) as sock:
        sock.settimeout(2)
        steering.protect(sock)
        transparent(sock)
        sock.setsockopt(socket.SOL_SOCKET, SO_MARK, 0x111)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
        try:
            sock.bind((client, 0))
            sock.connect(target)
            sock.sendall(b"hello")
            return sock.recv(200).decode()
        except TimeoutError:
            return "ETIMEDOUT"
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error))


@dataclass
class TinyAgent:
    """Threads that answer on a pod's listeners, and beat.

    Outbound: `OUTBOUND DESTINATION from SOURCE`. Inbound: `INBOUND` and what
    the pod's app said when dialed under the client's address.
    """

    steering: Steering
    netns: Netns
    lease_s: float = 60
    listeners: dict[tuple[Role, int], socket.socket] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _hung: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        self.listeners = open_listeners(self.netns)
        for (role, _), sock in self.listeners.items():
            self._run(_loop, sock, self._answer(role), self._stop)
        self.steering.beat(lease_s=self.lease_s)
        self._run(self._beat)

    def _run(self, target: object, *args: object) -> None:
        assert callable(target)
        thread = threading.Thread(target=target, args=args, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _beat(self) -> None:
        while not self._stop.wait(0.1):
            if not self._hung.is_set():
                self.steering.beat(lease_s=self.lease_s)

    def hang(self) -> None:
        """No beats from here on, and the last one was long ago."""
        self._hung.set()
        time.sleep(0.02)  # for a beat under way
        self.steering._heart[0] = 0

    def wake(self) -> None:
        """Beat again."""
        if self._hung.is_set():
            self.steering.beat(lease_s=self.lease_s)
            self._hung.clear()

    def _answer(self, role: Role) -> object:
        def answer(sock: socket.socket, client: tuple[str, int]) -> None:
            here = sock.getsockname()[:2]
            if role is Role.INBOUND:
                said = dial_app(self.netns, self.steering, client[0], here)
            else:
                sock.recv(100)
                said = f"{here[0]} {here[1]} from {client[0]}"
            sock.sendall(f"{role.name} {said}".encode())

        return answer

    def stop(self) -> None:
        """End threads and listeners: what a dead agent leaves."""
        self._stop.set()
        for sock in self.listeners.values():
            _end(sock)
        for thread in self._threads:
            thread.join(3)


# --- looking at the wire ------------------------------------------------------------


@contextlib.contextmanager
def wiretap(device: str) -> Iterator[list[tuple[str, str, int, bytes]]]:
    """TCP packets that cross a device of the caller's netns: (source, destination, flags, data)."""
    seen: list[tuple[str, str, int, bytes]] = []
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as raw:
        raw.bind((device, 3))
        yield seen
        time.sleep(0.05)
        raw.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                packet = _tcp(raw.recv(65536))
                if packet is not None:
                    seen.append(packet)


def _tcp(frame: bytes) -> tuple[str, str, int, bytes] | None:
    kind = struct.unpack_from("!H", frame, 12)[0]
    if kind == 0x0800 and frame[23] == 6:
        start, source, destination = 14 + (frame[14] & 15) * 4, frame[26:30], frame[30:34]
        end = 14 + struct.unpack_from("!H", frame, 16)[0]
    elif kind == 0x86DD and frame[20] == 6:
        start, source, destination = 54, frame[22:38], frame[38:54]
        end = 54 + struct.unpack_from("!H", frame, 18)[0]
    else:
        return None
    data = frame[start + (frame[start + 12] >> 4) * 4 : end]
    return str(ip_address(source)), str(ip_address(destination)), frame[start + 13], data
