"""Who reaches whom through the mesh, who carries it, and that bytes arrive whole."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address

import pytest

from meshbpf.agent.core.address import SocketAddress
from tests.netns.talk import (
    MARKER,
    datagram_passes,
    echo,
    in_kernel,
    passes,
    receive,
    receive_all,
    whoami,
)
from tests.progs import server
from tests.progs.pod import Family, Pod
from tests.testbed import Testbed

pytestmark = [pytest.mark.root, pytest.mark.netns]

# Client, server, and what carries it: "hbone" between two captured pods, "near"
# on one node, "in" for plaintext that a captured server gets, "none" outside the mesh.
PATHS = [
    pytest.param("n1a", "n2a", "hbone", id="cross-node"),
    pytest.param("n2b", "n1b", "hbone", id="cross-node-back"),
    pytest.param("n1a", "n1b", "near", id="same-node"),
    pytest.param("n1a", "n2x", "none", id="captured-to-uncaptured-cross-node"),
    pytest.param("n1a", "n1x", "none", id="captured-to-uncaptured-same-node"),
    pytest.param("n2x", "n1a", "in", id="uncaptured-to-captured-cross-node"),
    pytest.param("n1x", "n1a", "in", id="uncaptured-to-captured-same-node"),
    pytest.param("n1x", "n2x", "none", id="uncaptured-alone"),
]


@pytest.mark.parametrize(("client", "target", "carrier"), PATHS)
def test_a_pod_address_is_reached_and_carried_as_it_should(
    bed: Testbed, family: Family, client: str, target: str, carrier: str
) -> None:
    source, destination = bed[client], bed[target]
    target_ip = ip_address(destination.address(family))
    if carrier in ("near", "in"):
        passes(bed, source, destination.address(family))  # the agent decides, once
    with bed.connect(source, destination.address(family), server.ECHO) as sock:
        echo(sock)
        assert sock.getpeername()[:2] == (destination.address(family), server.ECHO)
        seen = sorted(
            (one.direction, one.path, one.protocol, one.peer_identity)
            for agent in bed.agents.values()
            for one in agent.carried(source.address(family))
            # An earlier test's connection may still be draining.
            if one.destination == str(SocketAddress(target_ip, server.ECHO))
        )
    # Without cgroup hooks nobody attests whose a connection is.
    near = ("kernel", "TCP") if in_kernel(bed) else ("agent", "HBONE")
    expected = {
        "hbone": [
            ("inbound", "agent", "HBONE", source.identity),
            ("outbound", "agent", "HBONE", destination.identity),
        ],
        "near": [
            ("inbound", *near, source.identity),
            ("outbound", *near, destination.identity),
        ],
        "in": [("inbound", "kernel" if in_kernel(bed) else "agent", "TCP", "")],
        "none": [],
    }
    assert seen == expected[carrier]


@pytest.mark.parametrize("target", ["n2a", "n1b", "n2x"])
def test_a_service_address_is_reached(bed: Testbed, family: Family, target: str) -> None:
    source, destination = bed["n1a"], bed[target]
    with bed.connect(source, destination.vip(family), 80) as sock:
        echo(sock)
        assert sock.getpeername()[0] == destination.vip(family)
        (out,) = bed.agent_of(source).carried(*sock.getsockname()[:2])
    assert out.service == f"apps/{destination.hostname}"
    assert out.protocol == ("HBONE" if destination.captured else "TCP")
    assert out.peer_identity == (destination.identity if destination.captured else "")


@pytest.mark.parametrize(("client", "target", "carrier"), PATHS)
def test_the_server_sees_the_clients_address_and_its_own(
    bed: Testbed, family: Family, client: str, target: str, carrier: str
) -> None:
    source, destination = bed[client], bed[target]
    assert whoami(bed, source, destination.address(family)) == {
        "server": target,
        "peer": source.address(family),
        "local": destination.address(family),
    }


def test_a_pod_reaches_itself(bed: Testbed, family: Family) -> None:
    pod = bed["n1a"]
    seen = whoami(bed, pod, pod.address(family))
    assert seen == {"server": "n1a", "peer": pod.address(family), "local": pod.address(family)}


def test_loopback_is_left_alone(bed: Testbed, family: Family) -> None:
    address = "127.0.0.1" if family == 4 else "::1"
    assert whoami(bed, bed["n1a"], address)["peer"] == address


def test_two_pods_of_one_account_are_seen_under_their_own_addresses(
    bed: Testbed, family: Family
) -> None:
    one, two, target = bed["n1a"], bed["n1b"], bed["n2a"].address(family)
    assert one.identity == two.identity
    for _ in range(3):
        assert whoami(bed, one, target)["peer"] == one.address(family)
        assert whoami(bed, two, target)["peer"] == two.address(family)


def test_a_server_may_speak_first(bed: Testbed, family: Family) -> None:
    with bed.connect(bed["n1a"], bed["n2a"].address(family), server.GREET) as sock:
        greeting = b"220 n2a ready\r\n"
        assert receive(sock, len(greeting)) == greeting
        echo(sock)


def test_the_client_may_end_its_side_first(bed: Testbed, family: Family) -> None:
    with bed.connect(bed["n1a"], bed["n2a"].address(family), server.SINK) as sock:
        sock.sendall(MARKER * 1000)
        sock.shutdown(socket.SHUT_WR)
        # The sink answers only once it has seen the end of our side.
        assert json.loads(receive_all(sock))["bytes"] == len(MARKER) * 1000


def test_the_server_may_end_its_side_first(bed: Testbed, family: Family) -> None:
    destination = bed["n2a"]
    with bed.connect(bed["n1a"], destination.address(family), server.FAREWELL) as sock:
        assert receive_all(sock) == b"bye\n"
        mark = bed.servers["n2a"].mark()
        sock.sendall(b"after you")
        time.sleep(0.1)
        sock.sendall(b" have gone")
    told = bed.servers["n2a"].wait_event("closed", since=mark, service="farewell")
    assert (told["end"], told["text"]) == ("fin", "after you have gone")


@pytest.mark.parametrize("target", ["n2a", "n1b"])
def test_256_mib_each_way_at_once_arrive_whole(bed: Testbed, family: Family, target: str) -> None:
    size = str(256 << 20)
    address = bed[target].address(family)
    bed.client(bed["n1a"], "exchange", address, server.EXCHANGE, "--bytes", size)


def test_an_edge_triggered_client_never_stalls(bed: Testbed, family: Family) -> None:
    address, size = bed["n2a"].address(family), str(32 << 20)
    bed.client(bed["n1a"], "exchange", address, server.EXCHANGE, "--bytes", size, "--edge")


def test_500_connections_live_at_once(bed: Testbed, family: Family) -> None:
    address = bed["n2a"].address(family)
    bed.client(bed["n1a"], "many", address, server.ECHO, "--connections", "500")


def test_an_mptcp_client_is_captured_and_served(bed: Testbed, family: Family) -> None:
    bed.client(bed["n1a"], "echo", bed["n2a"].address(family), server.ECHO, "--mptcp")
    bed.client(bed["n1a"], "echo", bed["n2a"].vip(family), 80, "--mptcp")


def test_a_dual_stack_socket_may_dial_a_mapped_address(bed: Testbed) -> None:
    seen = bed.client(bed["n1a"], "echo", bed["n2a"].ipv4, server.ECHO, "--mapped")
    assert seen["peer"] == f"::ffff:{bed['n2a'].ipv4}"
    # The service's address has no host behind it: only a captured dial arrives.
    bed.client(bed["n1a"], "echo", bed["n2a"].vip(4), 80, "--mapped")


def test_datagrams_are_left_alone(bed: Testbed, family: Family) -> None:
    datagram_passes(bed["n1a"], bed["n2a"].address(family))
    datagram_passes(bed["n2x"], bed["n1a"].address(family))


def test_a_slow_reader_holds_its_sender_back(bed: Testbed, family: Family) -> None:
    """What a sender may have under way is bounded by windows and socket buffers."""
    source, destination = bed["n1a"], bed["n2a"]
    agents = (bed.agent_of(source), bed.agent_of(destination))
    before = [_resident_bytes(agent.pid) for agent in agents]
    with bed.connect(source, destination.address(family), server.SLOW) as sock:
        sock.settimeout(1.5)
        sent, chunk, deadline = 0, bytes(1 << 20), time.monotonic() + 3
        try:
            while time.monotonic() < deadline:
                sent += sock.send(chunk)
        except TimeoutError:
            pass  # held back for longer than the timeout: what is to be shown
        after = [_resident_bytes(agent.pid) for agent in agents]
    # 4 MiB of stream window and the sockets' buffers on three legs; the server took 1 MiB/s.
    assert sent < 64 << 20
    for was, now in zip(before, after, strict=True):
        assert now - was < 48 << 20


def test_both_pods_of_a_pair_may_call_each_other_at_once(bed: Testbed, family: Family) -> None:
    one, two = bed["n1a"], bed["n2a"]

    def exchange(pair: tuple[Pod, Pod]) -> None:
        address, size = pair[1].address(family), str(8 << 20)
        bed.client(pair[0], "exchange", address, server.EXCHANGE, "--bytes", size)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(exchange, [(one, two), (two, one)]))


def _resident_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * 4096
