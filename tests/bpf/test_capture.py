"""What is captured, in every capture mode, and what is left alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from ipaddress import ip_network
from pathlib import Path

import pytest

from meshbpf.agent.datapath.netns import Netns
from meshbpf.agent.datapath.steering import PodSteering, Steering
from tests.bpf import lab
from tests.bpf.lab import TinyAgent, dial

BOTH = pytest.mark.parametrize(
    ("own", "mesh", "peer_address"),
    [
        (lab.POD_V4, lab.MESH_V4, lab.PEER_V4),
        (lab.POD_V6, lab.MESH_V6, lab.PEER_V6),
    ],
    ids=["v4", "v6"],
)


@BOTH
def test_outbound_reaches_the_listener_with_both_addresses_kept(
    agent: TinyAgent, own: str, mesh: str, peer_address: str
) -> None:
    assert dial(agent.netns, mesh, 4242) == f"OUTBOUND {mesh} 4242 from {own}"


@BOTH
def test_the_application_sees_the_address_that_it_dialed(
    agent: TinyAgent, own: str, mesh: str, peer_address: str
) -> None:
    with agent.netns.socket(lab.family_of(mesh), socket.SOCK_STREAM) as sock:
        sock.settimeout(2)
        sock.connect((mesh, 4242))
        assert sock.getpeername()[:2] == (mesh, 4242)
        assert sock.getsockname()[0] == own


@BOTH
def test_outside_the_mesh_is_left_alone(
    agent: TinyAgent, peer: Netns, own: str, mesh: str, peer_address: str
) -> None:
    assert dial(agent.netns, peer_address) == f"app peer saw {own}"


@BOTH
def test_loopback_and_own_addresses_are_left_alone(
    agent: TinyAgent, own: str, mesh: str, peer_address: str
) -> None:
    agent.steering.set_mesh([*lab.MESH, ip_network(own)])
    loopback = "::1" if ":" in own else "127.0.0.1"
    assert dial(agent.netns, own) == f"app pod saw {own}"
    assert dial(agent.netns, loopback) == f"app pod saw {loopback}"


@BOTH
def test_inbound_reaches_the_app_under_the_clients_address(
    agent: TinyAgent, peer: Netns, own: str, mesh: str, peer_address: str
) -> None:
    assert dial(peer, own) == f"INBOUND app pod saw {peer_address}"


@BOTH
def test_the_agent_hears_at_once_that_the_app_refuses(
    agent: TinyAgent, peer: Netns, own: str, mesh: str, peer_address: str
) -> None:
    assert dial(peer, own, 4243) == "INBOUND ECONNREFUSED"


@BOTH
def test_port_15008_reaches_the_hbone_listener(
    agent: TinyAgent, peer: Netns, own: str, mesh: str, peer_address: str
) -> None:
    assert dial(peer, own, 15008) == f"HBONE {own} 15008 from {peer_address}"


@BOTH
def test_the_pods_own_port_15008_is_the_agents(
    agent: TinyAgent, own: str, mesh: str, peer_address: str
) -> None:
    with agent.netns.socket(lab.family_of(own), socket.SOCK_STREAM) as sock:
        agent.steering.protect(sock)
        sock.settimeout(2)
        sock.connect((own, 15008))
        sock.sendall(b"hello")
        assert sock.recv(100).decode() == f"HBONE {own} 15008 from {own}"


@BOTH
def test_exempt_ports_are_left_alone_both_ways(
    agent: TinyAgent, peer: Netns, own: str, mesh: str, peer_address: str
) -> None:
    agent.steering.set_mesh([*lab.MESH, *lab.PEER_IN_MESH])
    wanted = PodSteering("ns/pod", agent.netns, exempt_ports=frozenset({lab.APP_PORT}))
    agent.steering.attach(wanted, agent.listeners)
    assert dial(agent.netns, peer_address) == f"app peer saw {own}"
    assert dial(peer, own) == f"app pod saw {peer_address}"
    assert dial(agent.netns, peer_address, 81) == f"OUTBOUND {peer_address} 81 from {own}"
    agent.steering.attach(PodSteering("ns/pod", agent.netns), agent.listeners)
    assert dial(agent.netns, peer_address) == f"OUTBOUND {peer_address} 80 from {own}"


@BOTH
def test_exempt_networks_are_left_alone_both_ways(
    agent: TinyAgent, peer: Netns, own: str, mesh: str, peer_address: str
) -> None:
    agent.steering.set_mesh([*lab.MESH, *lab.PEER_IN_MESH])
    wanted = PodSteering("ns/pod", agent.netns, exempt_cidrs=(ip_network(peer_address),))
    agent.steering.attach(wanted, agent.listeners)
    assert dial(agent.netns, peer_address) == f"app peer saw {own}"
    assert dial(peer, own) == f"app pod saw {peer_address}"


def test_an_exempt_interface_is_left_alone(agent: TinyAgent, peer: Netns) -> None:
    lab.run("ip", "link", "add", "stx0", "type", "veth", "peer", "eth1", "netns", lab.POD)
    try:
        lab.ip(lab.HOST, "addr", "add", "198.18.43.1/24", "dev", "stx0")
        lab.ip(lab.HOST, "link", "set", "stx0", "up")
        lab.ip(lab.POD, "addr", "add", "198.18.43.2/24", "dev", "eth1")
        lab.ip(lab.POD, "link", "set", "eth1", "up")
        agent.steering.set_mesh([*lab.MESH, ip_network("198.18.43.1/32")])
        wanted = PodSteering("ns/pod", agent.netns, exempt_interfaces=frozenset({"eth1"}))
        seen = agent.steering.attach(wanted, agent.listeners)
        assert seen.interfaces == ("eth0",)
        with lab.opened(lab.HOST) as host:
            assert dial(host, "198.18.43.2") == "app pod saw 198.18.43.1"
            assert dial(host, lab.POD_V4).startswith("INBOUND")
    finally:
        lab.ip(lab.HOST, "link", "del", "stx0")


@pytest.mark.parametrize("mark", [0x111, 0x539, 0x6D620111], ids=hex)
@pytest.mark.parametrize("mesh", [lab.MESH_V4, lab.MESH_V6], ids=["v4", "v6"])
def test_a_pod_that_sets_marks_is_still_captured(agent: TinyAgent, mark: int, mesh: str) -> None:
    assert dial(agent.netns, mesh, mark=mark).startswith(f"OUTBOUND {mesh} 80")


@pytest.mark.parametrize("mesh", [lab.MESH_V4, lab.MESH_V6], ids=["v4", "v6"])
def test_taking_the_mark_off_afterwards_leaks_nothing(agent: TinyAgent, mesh: str) -> None:
    with (
        lab.wiretap(f"{lab.TAG}v1") as seen,
        agent.netns.socket(lab.family_of(mesh), socket.SOCK_STREAM) as sock,
    ):
        sock.settimeout(2)
        sock.connect((mesh, 80))
        sock.setsockopt(socket.SOL_SOCKET, lab.SO_MARK, 0)
        sock.sendall(b"secret")
        assert sock.recv(100).startswith(b"OUTBOUND")
    assert seen == []


@pytest.mark.parametrize("mesh", [lab.MESH_V4, lab.MESH_V6], ids=["v4", "v6"])
def test_a_socket_bound_to_the_interface_is_captured(agent: TinyAgent, mesh: str) -> None:
    assert dial(agent.netns, mesh, device="eth0").startswith(f"OUTBOUND {mesh} 80")


def test_a_socket_is_judged_anew_when_it_is_used_again(agent: TinyAgent, peer: Netns) -> None:
    with agent.netns.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.settimeout(2)
        sock.connect((lab.MESH_V4, 80))
        sock.sendall(b"hello")
        assert sock.recv(100).startswith(b"OUTBOUND")
        _disconnect(sock)
        sock.connect((lab.PEER_V4, 80))
        sock.sendall(b"hello")
        assert sock.recv(100).decode() == f"app peer saw {lab.POD_V4}"
        _disconnect(sock)
        sock.connect((lab.MESH_V4, 80))
        sock.sendall(b"hello")
        assert sock.recv(100).startswith(b"OUTBOUND")


def _disconnect(sock: socket.socket) -> None:
    """connect() to AF_UNSPEC, which Python's socket module cannot say."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.connect(sock.fileno(), bytes(16), 16) == 0


@BOTH
def test_the_agents_own_socket_is_not_captured(
    agent: TinyAgent, peer: Netns, own: str, mesh: str, peer_address: str
) -> None:
    agent.steering.set_mesh(lab.PEER_IN_MESH)
    with agent.netns.socket(lab.family_of(own), socket.SOCK_STREAM) as sock:
        agent.steering.protect(sock)
        sock.settimeout(2)
        sock.bind((own, 0))
        sock.connect((peer_address, 80))
        sock.sendall(b"hello")
        assert sock.recv(100).decode() == f"app peer saw {own}"
    assert dial(agent.netns, peer_address).startswith("OUTBOUND")


@pytest.mark.parametrize("mesh", [lab.MESH_V4, lab.MESH_V6], ids=["v4", "v6"])
def test_mptcp_is_captured(agent: TinyAgent, mesh: str) -> None:
    answer = dial(agent.netns, mesh, protocol=lab.IPPROTO_MPTCP)
    assert answer.startswith(f"OUTBOUND {mesh} 80")


def test_a_dual_stack_socket_to_a_mapped_address_is_captured_as_ipv4(agent: TinyAgent) -> None:
    answer = dial(agent.netns, f"::ffff:{lab.MESH_V4}")
    assert answer == f"OUTBOUND {lab.MESH_V4} 80 from {lab.POD_V4}"


def test_no_netfilter_rule_is_made(agent: TinyAgent) -> None:
    with agent.netns.entered():
        tables = [Path("/proc/thread-self/net/ip_tables_names"), Path("/proc/net/ip6_tables_names")]
        assert [path.read_text() for path in tables if path.exists() and path.read_text()] == []
        listed = subprocess.run(["nft", "list", "ruleset"], capture_output=True, check=False)
        assert listed.stdout == b""


# --- probes ---------------------------------------------------------------------------


@pytest.fixture
def probe_cgroup() -> Path:
    path = lab.CGROUP2 / f"{lab.TAG}-probe"
    (path / "below").mkdir(parents=True, exist_ok=True)
    yield path  # type: ignore[misc]
    (path / "below").rmdir()
    path.rmdir()


PROBE = """
import socket, sys
open(sys.argv[1] + "/cgroup.procs", "w").write("0")
sock = socket.create_connection((sys.argv[2], 80), 2)
sock.sendall(b"hello")
print(sock.recv(200).decode())
"""


def probe_from(cgroup: Path, address: str) -> str:
    argv = [sys.executable, "-c", PROBE, str(cgroup), address]
    return lab.run(*argv).strip()


@pytest.mark.parametrize(
    ("own", "host"), [(lab.POD_V4, lab.HOST_V4), (lab.POD_V6, lab.HOST_V6)], ids=["v4", "v6"]
)
def test_probes_of_the_kubelet_and_they_alone_go_to_the_app(
    agent: TinyAgent, probe_cgroup: Path, own: str, host: str
) -> None:
    assert agent.steering.set_probe_cgroups([probe_cgroup]) == ()
    assert probe_from(probe_cgroup, own) == f"app pod saw {host}"
    assert probe_from(probe_cgroup / "below", own) == f"app pod saw {host}"
    assert probe_from(lab.CGROUP2, own) == f"INBOUND app pod saw {host}"


def test_a_probe_cgroup_that_is_missing_is_reported(steering: Steering) -> None:
    (reason,) = steering.set_probe_cgroups([Path(f"/sys/fs/cgroup/nowhere-{os.getpid()}")])
    assert "No such file" in reason
