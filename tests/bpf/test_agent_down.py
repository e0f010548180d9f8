"""What becomes of connections when the agent is killed, hangs, or is silent for long."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from meshbpf.agent.datapath.netns import Netns
from meshbpf.agent.datapath.steering import PodSteering, Steering
from tests.bpf import lab
from tests.bpf.conftest import Open
from tests.bpf.lab import TinyAgent, dial

REFUSED_WITHIN_S = 1.0
HEARTBEAT_LIMIT_S = 0.5

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module", params=["auto", "tc"])
def capture(request: pytest.FixtureRequest) -> str:
    """Clsact filters and tcx links hold the same programs: what is told here is told of both."""
    mode: str = request.param
    return mode


@pytest.fixture
def agent_id() -> str:
    return f"st-killed-{os.getpid()}-{time.monotonic_ns()}"


@pytest.fixture
def start(
    pod: Netns, peer: Netns, cache_dir: Path, open_steering: Open, agent_id: str
) -> Iterator[Start]:
    """Starts agent processes; at the end they and their capture are gone."""
    started: list[subprocess.Popen[str]] = []

    def do_start(mode: str, down: str, lease_s: float = 60) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "tests.bpf.agent_process"]
        process = subprocess.Popen(
            [*argv, agent_id, str(cache_dir), mode, down, str(lease_s)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    with lab.app(pod, "pod"):
        yield do_start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    open_steering(agent_id)  # whose end destroys it


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def stop(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGSTOP)
    time.sleep(HEARTBEAT_LIMIT_S + 0.15)


DOWN = pytest.mark.parametrize("down", [kill, stop], ids=["SIGKILL", "SIGSTOP"])
FAMILIES = [
    (lab.POD_V4, lab.MESH_V4, lab.PEER_V4),
    (lab.POD_V6, lab.MESH_V6, lab.PEER_V6),
]


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < REFUSED_WITHIN_S


@DOWN
def test_closed_refuses_mesh_connections_at_once_both_ways(
    start: Start, capture: str, down: Callable[..., None], pod: Netns, peer: Netns
) -> None:
    process = start(capture, "closed")
    assert dial(pod, lab.MESH_V4).startswith("OUTBOUND")
    assert dial(peer, lab.POD_V6).startswith("INBOUND")
    down(process)
    for own, mesh, _ in FAMILIES:
        with at_once():
            assert dial(pod, mesh) == "ECONNREFUSED"
        with at_once():
            assert dial(peer, own) == "ECONNREFUSED"
        with at_once():
            assert dial(peer, own, 15008) == "ECONNREFUSED"


@DOWN
def test_open_lets_connections_pass_both_ways(
    start: Start, capture: str, down: Callable[..., None], pod: Netns, peer: Netns
) -> None:
    process = start(capture, "open")
    assert dial(pod, lab.PEER_V4).startswith("OUTBOUND")
    down(process)
    for own, _, peer_address in FAMILIES:
        assert dial(pod, peer_address) == f"app peer saw {own}"
        assert dial(peer, own) == f"app pod saw {peer_address}"


def test_closed_passes_what_never_needs_the_agent(
    start: Start, capture: str, pod: Netns, peer: Netns
) -> None:
    process = start(capture, "closed")
    kill(process)
    with lab.opened(lab.HOST) as host, lab.app(host, "host", 8080):
        assert dial(pod, lab.HOST_V4, 8080) == f"app host saw {lab.POD_V4}"
        assert dial(pod, lab.HOST_V6, 8080) == f"app host saw {lab.POD_V6}"
    assert dial(pod, lab.POD_V4) == f"app pod saw {lab.POD_V4}"
    with peer.socket(socket.AF_INET, socket.SOCK_DGRAM) as there:
        there.bind((lab.PEER_V4, 5353))
        there.settimeout(1)
        with pod.socket(socket.AF_INET, socket.SOCK_DGRAM) as here:
            here.sendto(b"udp", (lab.PEER_V4, 5353))
        assert there.recv(10) == b"udp"


def test_after_the_lease_closed_refuses_everything_and_open_nothing(
    start: Start, capture: str, pod: Netns, peer: Netns, agent_id: str
) -> None:
    process = start(capture, "closed", lease_s=0.8)
    with lab.opened(lab.HOST) as host, lab.app(host, "host", 8080):
        assert dial(pod, lab.HOST_V4, 8080) == f"app host saw {lab.POD_V4}"
        kill(process)
        assert dial(pod, lab.HOST_V4, 8080) == f"app host saw {lab.POD_V4}"
        time.sleep(0.9)
        for address in (lab.HOST_V4, lab.HOST_V6):
            with at_once():
                assert dial(pod, address, 8080) == "ECONNREFUSED"
        assert dial(pod, lab.POD_V4) == f"app pod saw {lab.POD_V4}"


def test_open_passes_after_the_lease(start: Start, capture: str, pod: Netns) -> None:
    kill(start(capture, "open", lease_s=0.2))
    time.sleep(0.3)
    with lab.opened(lab.HOST) as host, lab.app(host, "host", 8080):
        assert dial(pod, lab.HOST_V4, 8080) == f"app host saw {lab.POD_V4}"


def test_mptcp_and_odd_syns_are_refused_at_once_too(start: Start, capture: str, pod: Netns) -> None:
    kill(start(capture, "closed"))
    for mesh in (lab.MESH_V4, lab.MESH_V6, f"::ffff:{lab.MESH_V4}"):
        with at_once():
            assert dial(pod, mesh, protocol=lab.IPPROTO_MPTCP) == "ECONNREFUSED"
    with at_once():
        assert dial(pod, lab.MESH_V4, mark=0x539) == "ECONNREFUSED"
    with at_once():  # a SYN with IP options: router alert, and padding
        assert dial(pod, lab.MESH_V4, options=b"\x94\x04\0\0") == "ECONNREFUSED"


@pytest.mark.parametrize("mesh", [lab.PEER_V4, lab.PEER_V6], ids=["v4", "v6"])
@pytest.mark.parametrize("policy", ["closed", "open"])
def test_a_captured_connection_ends_with_its_agent_and_leaks_nothing(
    start: Start, capture: str, policy: str, pod: Netns, mesh: str
) -> None:
    process = start(capture, policy)
    with (
        lab.wiretap(f"{lab.TAG}v1") as seen,
        pod.socket(lab.family_of(mesh), socket.SOCK_STREAM) as sock,
    ):
        sock.settimeout(2)
        sock.connect((mesh, 80))
        kill(process)
        with at_once(), pytest.raises((ConnectionResetError, BrokenPipeError)):
            _talk(sock)
    assert seen == []


def _talk(sock: socket.socket) -> None:
    for _ in range(5):
        sock.sendall(b"secret")
        assert sock.recv(10) == b""  # FIN, from an agent that had time for it


def test_direct_connections_outlive_the_agent(
    start: Start, capture: str, pod: Netns, open_steering: Open
) -> None:
    process = start(capture, "closed")
    listener = socket.create_server((lab.HOST_V4, 8081))
    with listener, pod.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.settimeout(2)
        sock.connect((lab.HOST_V4, 8081))
        server, _ = listener.accept()
        with server:
            sock.sendall(b"before")
            assert server.recv(10) == b"before"
            kill(process)
            sock.sendall(b"after")
            assert server.recv(10) == b"after"


# --- taking over ----------------------------------------------------------------------


def test_the_next_agent_finds_the_pod_still_captured_and_takes_it_over(
    start: Start, capture: str, pod: Netns, peer: Netns, open_steering: Open, agent_id: str
) -> None:
    kill(start(capture, "closed"))
    steering = open_steering(agent_id, mode=capture)
    (found,) = steering.attached()
    assert (found.key, found.cookie) == ("ns/pod", pod.cookie)
    assert set(map(str, found.addresses)) == {lab.POD_V4, lab.POD_V6}
    assert dial(pod, lab.MESH_V4) == "ECONNREFUSED"
    _serve_and_check(steering, pod, peer)


def test_a_pod_left_without_an_agent_can_be_detached_by_the_next(
    start: Start, capture: str, pod: Netns, peer: Netns, open_steering: Open, agent_id: str
) -> None:
    kill(start(capture, "closed"))
    steering = open_steering(agent_id, mode=capture)
    steering.detach("ns/pod")
    assert steering.attached() == ()
    assert dial(peer, lab.POD_V4) == f"app pod saw {lab.PEER_V4}"
    assert dial(pod, lab.PEER_V4) == f"app peer saw {lab.POD_V4}"


def _serve_and_check(steering: Steering, pod: Netns, peer: Netns) -> None:
    tiny = TinyAgent(steering, pod)
    tiny.start()
    try:
        steering.attach(PodSteering("ns/pod", pod), tiny.listeners)
        for own, mesh, peer_address in FAMILIES:
            assert dial(pod, mesh) == f"OUTBOUND {mesh} 80 from {own}"
            assert dial(peer, own) == f"INBOUND app pod saw {peer_address}"
    finally:
        tiny.stop()
