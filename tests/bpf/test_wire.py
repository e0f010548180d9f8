"""What leaves a pod on the wire: sources, fragments, forwarded traffic; and odd pods."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator

import pytest

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.datapath.netns import Netns
from meshbpf.agent.datapath.steering import PodSteering, Steering
from tests.bpf import lab
from tests.bpf.lab import TinyAgent, dial
from tests.progs.packets import ipv4, ipv6, tcp

MORE_FRAGMENTS = 0x2000


def macs(netns: Netns) -> bytes:
    """The Ethernet header, without its type, of a frame from the pod to the host."""
    with netns.entered():
        source = _mac("eth0")
    return _mac(f"{lab.TAG}v1") + source


def _mac(device: str) -> bytes:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((device, 0))
        address: bytes = raw.getsockname()[4]
        return address


def send(netns: Netns, *packets: bytes) -> None:
    """Put packets on the pod's eth0, as CAP_NET_RAW lets any program in it."""
    addresses = macs(netns)
    with netns.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind(("eth0", 0))
        for packet in packets:
            kind = 0x0800 if packet[0] >> 4 == 4 else 0x86DD
            raw.send(addresses + struct.pack("!H", kind) + packet)


def decided(steering: Steering, name: str) -> int:
    return steering.statistics().decisions[name]


def test_packets_under_a_foreign_source_do_not_leave_the_veth(agent: TinyAgent) -> None:
    before = agent.steering.statistics()
    with _udp(lab.HOST_V4) as received:
        for source in ("198.18.41.77", lab.POD_V4):
            payload = struct.pack("!HHHH", 5000, 5001, 8 + 4, 0) + b"data"
            send(agent.netns, ipv4(source, lab.HOST_V4, payload, kind=17))
        assert received.recvfrom(100)[1][0] == lab.POD_V4
    after = agent.steering.statistics()
    counted = after.pods["ns/pod"].spoofed_packets - before.pods["ns/pod"].spoofed_packets
    assert counted == 1
    assert after.decisions["spoofed_source"] == before.decisions["spoofed_source"] + 1
    assert after.pods["ns/pod"].from_pod_packets >= before.pods["ns/pod"].from_pod_packets + 2


def test_ipv6_packets_under_a_foreign_source_do_not_leave_the_veth(agent: TinyAgent) -> None:
    before = agent.steering.statistics().pods["ns/pod"]
    with lab.wiretap(f"{lab.TAG}v2") as seen:
        foreign = "fd00:6d62:41::77"
        send(agent.netns, ipv6(foreign, lab.PEER_V6, tcp(foreign, lab.PEER_V6)))
    assert seen == []
    after = agent.steering.statistics().pods["ns/pod"]
    assert after.spoofed_packets == before.spoofed_packets + 1


def _udp(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((address, 5001))
    sock.settimeout(2)
    return sock


def test_ping_and_neighbour_discovery_work_in_an_attached_pod(agent: TinyAgent) -> None:
    lab.ip(lab.POD, "neigh", "flush", "all")
    for address in (lab.HOST_V4, lab.HOST_V6):
        lab.run("ip", "netns", "exec", lab.POD, "ping", "-c1", "-W2", address)


@pytest.mark.parametrize("version", [4, 6])
def test_a_syn_in_fragments_does_not_reach_the_mesh(agent: TinyAgent, version: int) -> None:
    agent.steering.set_mesh(lab.PEER_IN_MESH)
    if version == 4:
        whole = tcp(lab.POD_V4, lab.PEER_V4)
        parts = [
            ipv4(lab.POD_V4, lab.PEER_V4, whole[:8], fragment=MORE_FRAGMENTS),
            ipv4(lab.POD_V4, lab.PEER_V4, whole[8:], fragment=1),
        ]
    else:
        whole = tcp(lab.POD_V6, lab.PEER_V6)
        parts = [
            ipv6(lab.POD_V6, lab.PEER_V6, _fragment(0, True) + whole[:8], kind=44),
            ipv6(lab.POD_V6, lab.PEER_V6, _fragment(1, False) + whole[8:], kind=44),
        ]
    before = decided(agent.steering, "opaque")
    with lab.wiretap(f"{lab.TAG}v1") as seen:
        for part in parts:
            with pytest.raises(OSError, match="No buffer space"):  # so a drop is told
                send(agent.netns, part)
    assert decided(agent.steering, "opaque") == before + 2
    assert seen == []


def _fragment(offset: int, more: bool) -> bytes:
    return struct.pack("!BBHI", 6, 0, offset << 3 | more, 7)


def test_a_syn_behind_ipv6_extension_headers_is_captured(agent: TinyAgent) -> None:
    padding = bytes((6, 0, 1, 4, 0, 0, 0, 0))  # destination options: PadN, then TCP
    hops = bytes((60, 1, 1, 12)) + bytes(12)  # hop-by-hop, 16 bytes, then destination options
    segment = tcp(lab.POD_V6, lab.MESH_V6)
    before = decided(agent.steering, "captured_by_tc")
    with lab.wiretap(f"{lab.TAG}v1") as seen:
        send(agent.netns, ipv6(lab.POD_V6, lab.MESH_V6, hops + padding + segment, kind=0))
    assert decided(agent.steering, "captured_by_tc") == before + 1
    assert seen == []


def test_a_crafted_syn_of_the_pod_is_captured(agent: TinyAgent) -> None:
    with lab.wiretap(f"{lab.TAG}v1") as seen:
        send(
            agent.netns,
            ipv4(lab.POD_V4, lab.MESH_V4, tcp(lab.POD_V4, lab.MESH_V4)),
            ipv6(lab.POD_V6, lab.MESH_V6, tcp(lab.POD_V6, lab.MESH_V6)),
        )
    assert [one for one in seen if one[1] in (lab.MESH_V4, lab.MESH_V6)] == []


# --- traffic that a pod forwards ------------------------------------------------------------


INNER = f"{lab.TAG}-inner"


@pytest.fixture
def inner(agent: TinyAgent) -> Iterator[Netns]:
    """A namespace behind the pod, as a container of a Docker in it."""
    lab.remove(INNER)
    lab.run("ip", "netns", "add", INNER)
    try:
        lab.ip(INNER, "link", "set", "lo", "up")
        pair = ("type", "veth", "peer", "eth0", "netns", INNER)
        lab.run("ip", "link", "add", "docker0", "netns", lab.POD, *pair)
        for where, device, number in ((lab.POD, "docker0", 1), (INNER, "eth0", 2)):
            lab.ip(where, "addr", "add", f"198.18.44.{number}/24", "dev", device)
            lab.ip(where, "addr", "add", f"fd00:6d62:44::{number}/64", "dev", device, "nodad")
            lab.ip(where, "link", "set", device, "up")
        lab.ip(INNER, "route", "add", "default", "via", "198.18.44.1")
        lab.ip(INNER, "-6", "route", "add", "default", "via", "fd00:6d62:44::1")
        lab.sysctl(lab.POD, "net/ipv4/ip_forward", "1")
        lab.sysctl(lab.POD, "net/ipv6/conf/all/forwarding", "1")
        with lab.opened(INNER) as netns:
            yield netns
    finally:
        lab.ip(lab.POD, "link", "del", "docker0")
        lab.remove(INNER)
        lab.sysctl(lab.POD, "net/ipv4/ip_forward", "0")
        lab.sysctl(lab.POD, "net/ipv6/conf/all/forwarding", "0")


@pytest.mark.parametrize(
    ("mesh", "source"),
    [(lab.MESH_V4, "198.18.44.2"), (lab.MESH_V6, "fd00:6d62:44::2")],
    ids=["v4", "v6"],
)
def test_connections_that_a_pod_forwards_are_captured(
    agent: TinyAgent, inner: Netns, mesh: str, source: str
) -> None:
    assert dial(inner, mesh) == f"OUTBOUND {mesh} 80 from {source}"


@pytest.mark.parametrize("mesh", [lab.MESH_V4, lab.MESH_V6], ids=["v4", "v6"])
def test_connections_that_a_pod_forwards_are_refused_at_once_without_an_agent(
    agent: TinyAgent, inner: Netns, mesh: str
) -> None:
    agent.hang()
    began = time.monotonic()
    assert dial(inner, mesh) == "ECONNREFUSED"
    assert time.monotonic() - began < 1


@pytest.fixture
def fast_open(agent: TinyAgent) -> Iterator[None]:
    """Data in the SYN, without a cookie: the client's side of it alone."""
    name = "net/ipv4/tcp_fastopen"
    lab.sysctl(lab.POD, name, str(0x5))
    yield
    lab.sysctl(lab.POD, name, "1")


@pytest.mark.parametrize("mesh", [lab.MESH_V4, lab.MESH_V6], ids=["v4", "v6"])
def test_a_syn_that_carries_data_is_captured_and_refused_as_any(
    agent: TinyAgent, fast_open: None, mesh: str
) -> None:
    def say_hello() -> str:
        with agent.netns.socket(lab.family_of(mesh), socket.SOCK_STREAM) as sock:
            sock.settimeout(2)
            sock.sendto(b"hello", socket.MSG_FASTOPEN, (mesh, 80))
            return sock.recv(100).decode()

    with lab.wiretap(f"{lab.TAG}v1") as seen:
        assert say_hello().startswith(f"OUTBOUND {mesh} 80")
        agent.hang()
        with pytest.raises(ConnectionRefusedError):
            say_hello()
    assert [one for one in seen if one[1] == mesh] == []


@pytest.mark.parametrize("mesh", [lab.MESH_V4, lab.MESH_V6], ids=["v4", "v6"])
def test_capture_works_with_syn_cookies(agent: TinyAgent, peer: Netns, mesh: str) -> None:
    lab.sysctl(lab.POD, "net/ipv4/tcp_syncookies", "2")
    try:
        assert dial(agent.netns, mesh).startswith(f"OUTBOUND {mesh} 80")
        own = lab.POD_V6 if ":" in mesh else lab.POD_V4
        assert dial(peer, own).startswith("INBOUND app pod saw")
    finally:
        lab.sysctl(lab.POD, "net/ipv4/tcp_syncookies", "1")


# --- odd pods ----------------------------------------------------------------------------------


@pytest.fixture
def bare(in_host: Netns) -> Iterator[str]:
    name = f"{lab.TAG}-p4"
    lab.remove_pod(name, 4)
    lab.add_pod(name, 4)
    yield name
    lab.remove_pod(name, 4)


def _attached(steering: Steering, netns: Netns) -> TinyAgent:
    tiny = TinyAgent(steering, netns)
    tiny.start()
    steering.attach(PodSteering("ns/odd", netns), tiny.listeners)
    return tiny


def test_a_pod_without_ipv6_is_captured_in_ipv4(
    steering: Steering, bare: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.sysctl(bare, "net/ipv6/conf/all/disable_ipv6", "1")
    monkeypatch.setattr(lab, "open_listeners", _open_v4)
    with lab.opened(bare) as netns:
        tiny = _attached(steering, netns)
        try:
            (found,) = steering.attached()
            assert [one.version for one in found.addresses] == [4]
            assert dial(netns, lab.MESH_V4).startswith("OUTBOUND")
        finally:
            tiny.stop()
            steering.detach("ns/odd")
        assert "fwmark" not in lab.ip(bare, "rule")


def _open_v4(netns: Netns) -> dict[tuple[lab.Role, int], socket.socket]:
    made = {}
    for role in lab.Role:
        sock = netns.socket(socket.AF_INET, socket.SOCK_STREAM)
        lab.transparent(sock)
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        made[role, int(socket.AF_INET)] = sock
    return made


def test_a_strict_reverse_path_filter_does_not_stop_capture(steering: Steering, bare: str) -> None:
    lab.sysctl(bare, "net/ipv4/conf/all/rp_filter", "1")
    with lab.opened(bare) as netns:
        tiny = _attached(steering, netns)
        try:
            assert dial(netns, lab.MESH_V4).startswith("OUTBOUND")
            assert dial(netns, lab.MESH_V4, mark=0x539).startswith("OUTBOUND")
        finally:
            tiny.stop()


def test_a_pod_without_an_address_is_refused(steering: Steering, in_host: Netns) -> None:
    name = f"{lab.TAG}-empty"
    lab.remove(name)
    lab.run("ip", "netns", "add", name)
    try:
        with lab.opened(name) as netns, pytest.raises(MeshbpfError) as caught:
            steering.attach(PodSteering("ns/empty", netns), {})
        assert caught.value.code == "no-address"
    finally:
        lab.remove(name)


def test_a_pod_whose_host_end_is_elsewhere_says_so(
    steering: Steering, in_host: Netns, bare: str
) -> None:
    pair = ("type", "veth", "peer", "stz0", "netns", lab.PEER)
    lab.run("ip", "link", "add", "eth1", "netns", bare, *pair)
    lab.ip(bare, "addr", "add", "198.18.45.1/32", "dev", "eth1")
    with lab.opened(bare) as netns:
        tiny = _attached(steering, netns)
        tiny.stop()
    (found,) = steering.attached()
    assert found.interfaces == ("eth0", "eth1")
    assert len(found.host_ifindexes) == 1
    (reason,) = found.host_skipped
    assert reason == "eth1: its other end is not in the agent's netns"
