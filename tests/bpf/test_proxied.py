"""A pod whose connections a proxy serves that is not ours: found, steered to, and left alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.datapath.netns import Netns
from meshbpf.agent.datapath.proxy_sockets import proxy_sockets
from meshbpf.agent.datapath.steering import PodSteering, Steering
from tests.bpf import lab
from tests.bpf.foreign_proxy import MARK

ROOT = Path(__file__).resolve().parents[2]
BOTH = pytest.mark.parametrize(
    ("own", "mesh", "peer_address"),
    [(lab.POD_V4, lab.MESH_V4, lab.PEER_V4), (lab.POD_V6, lab.MESH_V6, lab.PEER_V6)],
    ids=["v4", "v6"],
)


@dataclass
class Proxy:
    process: subprocess.Popen[str]

    def dial(self, address: str, port: int = lab.APP_PORT) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(address, port, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(5)


@pytest.fixture
def proxy(steering: Steering, pod: Netns, capture: str) -> Iterator[Proxy]:
    """The pod attached and handed to it; nothing ever beats. Its peer is in the mesh."""
    steering.set_mesh([*lab.MESH, *lab.PEER_IN_MESH])
    cgroup = lab.CGROUP2 / f"{lab.TAG}-proxy"
    cgroup.mkdir(exist_ok=True)
    argv = [sys.executable, "-m", "tests.bpf.foreign_proxy", lab.POD, str(cgroup)]
    # Under the client's address only where the connect hook is: see docs/zds.md.
    argv.append("1" if capture == "auto" else "0")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen(argv, **pipes) as process:  # type: ignore[call-overload]
        proxy = Proxy(process)
        try:
            assert process.stdout.readline() == "ready\n"
            steering.attach(PodSteering("ns/pod", pod, proxied=True), {})
            found = proxy_sockets(pod, process.pid)
            assert found.cgroup == cgroup.stat().st_ino
            steering.admit_proxy([found.cgroup])
            for sock in found.listeners.values():
                steering.protect(sock)
            steering.set_listeners("ns/pod", found.listeners)
            for sock in found.listeners.values():
                sock.close()
            with lab.app(pod, "pod"):
                yield proxy
        finally:
            proxy.kill()
            cgroup.rmdir()


@BOTH
def test_connections_reach_it_with_both_true_addresses(
    proxy: Proxy, pod: Netns, peer: Netns, own: str, mesh: str, peer_address: str
) -> None:
    assert lab.dial(pod, mesh, 8080) == f"15001 {mesh} 8080 from {own}"
    assert lab.dial(peer, own, 15008) == f"15008 {own} 15008 from {peer_address}"


@BOTH
def test_the_app_is_asked_under_the_client_s_address_where_that_can_be(
    proxy: Proxy, peer: Netns, capture: str, own: str, mesh: str, peer_address: str
) -> None:
    client = peer_address if capture == "auto" else own
    assert lab.dial(peer, own) == f"15006 app pod saw {client}"


@BOTH
def test_its_own_dials_leave_the_pod_and_nobody_else_s(
    proxy: Proxy, pod: Netns, peer: Netns, own: str, mesh: str, peer_address: str
) -> None:
    assert proxy.dial(peer_address) == f"app peer saw {own}"
    captured = f"15001 {peer_address} {lab.APP_PORT} from {own}"
    assert lab.dial(pod, peer_address) == captured
    assert lab.dial(pod, peer_address, mark=MARK) == captured


@pytest.mark.parametrize(
    ("own", "outside"), [(lab.POD_V4, lab.HOST_V4), (lab.POD_V6, lab.HOST_V6)], ids=["v4", "v6"]
)
def test_without_a_lease_it_has_what_is_outside_the_mesh_too(
    proxy: Proxy, steering: Steering, pod: Netns, own: str, outside: str
) -> None:
    assert lab.dial(pod, outside) == f"15001 {outside} {lab.APP_PORT} from {own}"
    steering.beat(lease_s=60)
    assert lab.dial(pod, outside) == "ECONNREFUSED"  # from there: nobody listens


@BOTH
def test_when_it_has_ended_the_pod_is_closed_at_once(
    proxy: Proxy, pod: Netns, peer: Netns, own: str, mesh: str, peer_address: str
) -> None:
    proxy.kill()
    assert lab.dial(pod, mesh) == "ECONNREFUSED"
    assert lab.dial(peer, own) == "ECONNREFUSED"


def test_a_process_that_does_not_listen_is_no_proxy(steering: Steering, pod: Netns) -> None:
    with subprocess.Popen(["sleep", "60"]) as idle:
        try:
            with pytest.raises(MeshbpfError, match="no listener for hbone, inbound, outbound"):
                proxy_sockets(pod, idle.pid)
        finally:
            idle.kill()
    with pytest.raises(MeshbpfError, match="cannot be had"):
        proxy_sockets(pod, idle.pid)
