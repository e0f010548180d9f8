"""Endpoints of services that the kernel draws, and carries to."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from meshbpf.agent.api import ConnectionInfo, StatusRequest
from tests.netns.talk import MARKER, echo, ends, passes, receive_all, refused
from tests.progs import server
from tests.progs.inside import inside
from tests.progs.pod import NAMESPACE, Family, Pod
from tests.progs.program import eventually
from tests.testbed import SUITE_TAG, Testbed

pytestmark = [pytest.mark.root, pytest.mark.netns]

HOST = "together.apps.svc.cluster.local"
VIPS: dict[Family, str] = {4: "198.19.9.1", 6: "fd00:6d62:f09::1"}
MISSING = 4999
"""A port of the service at which no endpoint listens."""
PORTS = {80: server.ECHO, server.WHOAMI: server.WHOAMI, server.SINK: server.SINK, MISSING: MISSING}
LEASE_S = 4.0


class Together(Testbed):
    """With one service of several pods."""

    def __init__(self, tag: str, members: Iterable[str]) -> None:
        self.members = list(members)
        super().__init__(tag)

    def mesh(self, pods: Iterable[Pod]) -> dict[str, Any]:
        """See Testbed."""
        found = super().mesh(pods)
        for each in found["workloads"]:
            if each["name"] in self.members:
                each["services"][f"{NAMESPACE}/{HOST}"] = PORTS
        vips = [f"/{VIPS[4]}", f"/{VIPS[6]}"]
        found["services"].append(
            {
                "name": "together", "namespace": NAMESPACE, "hostname": HOST,
                "vips": vips, "ports": PORTS,
            }
        )  # fmt: skip
        return found

    def serve_by(self, *members: str) -> None:
        self.members = list(members)
        self.write_mesh()
        self.wait_mesh()


@pytest.fixture(scope="module")
def near() -> Iterator[Together]:
    with Together(f"{SUITE_TAG}svc", ["n1b", "n1c"]) as bed:
        bed.add_pod("n1c", 1)
        bed.add_pod("n1d", 1)
        bed.start_agents("--lease", f"{LEASE_S:g}s")
        bed.start_servers()
        bed.attach_all()
        yield bed


@pytest.fixture(autouse=True)
def two_members(near: Together) -> None:
    if near.members != ["n1b", "n1c"]:
        near.serve_by("n1b", "n1c")


def decided(bed: Testbed) -> dict[str, int | float]:
    return bed.agents[1].ask(StatusRequest()).statistics["decisions"]


def server_of(bed: Testbed, source: Pod, family: Family) -> str:
    """The name of the pod that answers one connection to the service."""
    with bed.connect(source, VIPS[family], server.WHOAMI) as sock:
        told = json.loads(receive_all(sock))
        assert sock.getpeername()[:2] == (VIPS[family], server.WHOAMI)
    assert told["peer"] == source.address(family)
    return next(pod.name for pod in bed.pods.values() if pod.address(family) == told["local"])


def drawn(bed: Testbed, source: Pod, family: Family, count: int) -> Counter[str]:
    return Counter(server_of(bed, source, family) for _ in range(count))


def carried(bed: Testbed, sock: socket.socket) -> list[ConnectionInfo]:
    return bed.agents[1].carried(*sock.getsockname()[:2])


def connect_led(bed: Testbed, source: Pod, family: Family, port: int = 80) -> socket.socket:
    """A connection to the service that the kernel carries."""
    found: list[socket.socket] = []

    def led() -> bool:
        before = decided(bed)["led"]
        sock = bed.connect(source, VIPS[family], port)
        if decided(bed)["led"] > before:
            found.append(sock)
            return True
        sock.close()
        return False

    eventually("the kernel draws", led, 5.0)
    return found[0]


def test_the_kernel_draws_and_the_app_sees_what_it_dialed(near: Together, family: Family) -> None:
    source = near["n1a"]
    with connect_led(near, source, family) as sock:
        echo(sock, MARKER * 1000)
        assert sock.getpeername()[:2] == (VIPS[family], 80)
        found = carried(near, sock)
        assert {(one.direction, one.path) for one in found} == {
            ("outbound", "kernel"),
            ("inbound", "kernel"),
        }
        assert {one.service for one in found} == {f"{NAMESPACE}/{HOST}"}
        before = decided(near)
    for _ in range(20):
        passes(near, source, VIPS[family], 80)
    after = decided(near)
    assert after["led"] == before["led"] + 20
    assert after["outbound"] == before["outbound"]


def test_each_endpoint_gets_its_share_near_and_far(near: Together, family: Family) -> None:
    near.serve_by("n1b", "n1c", "n2a")
    source = near["n1a"]
    drawn(near, source, family, 12)  # so that it is left to the kernel
    before = decided(near)
    found = drawn(near, source, family, 120)
    after = decided(near)
    assert set(found) == {"n1b", "n1c", "n2a"}
    # 40 each; a share that is drawn twice, or never, is 5 standard deviations away.
    assert all(15 <= count <= 65 for count in found.values()), found
    assert after["led"] - before["led"] == found["n1b"] + found["n1c"]
    assert after["outbound"] - before["outbound"] == found["n2a"]


def test_a_dual_stack_socket_sees_the_mapped_address_that_it_dialed(near: Together) -> None:
    connect_led(near, near["n1a"], 4).close()
    before = decided(near)["led"]
    seen = near.client(near["n1a"], "echo", VIPS[4], 80, "--mapped")
    assert seen["peer"] == f"::ffff:{VIPS[4]}"
    assert decided(near)["led"] == before + 1


def test_the_calling_pod_is_no_choice_of_its_own(near: Together, family: Family) -> None:
    """n1b is an endpoint itself: that part of the draws is the agent's."""
    source = near["n1b"]
    drawn(near, source, family, 8)
    found = drawn(near, source, family, 40)
    assert set(found) == {"n1b", "n1c"}


def test_a_policy_sends_a_share_to_the_agent_to_be_refused(near: Together, family: Family) -> None:
    source = near["n1a"]
    with connect_led(near, source, family) as sock:
        echo(sock)
        with near.policy(action="Deny", rules=[[[{"destinationPorts": [server.ECHO]}]]]):
            assert ends(sock, 2.0) == "reset"
            for _ in range(4):
                refused(near, source, VIPS[family], 80)
    connect_led(near, source, family).close()


def test_an_endpoint_that_has_left_is_drawn_no_more(near: Together, family: Family) -> None:
    source = near["n1a"]
    drawn(near, source, family, 8)
    near.serve_by("n1b")
    before = decided(near)["led"]
    assert set(drawn(near, source, family, 20)) == {"n1b"}
    assert decided(near)["led"] == before + 20, "the change was renewed, no connection needed"
    near.serve_by("n2a")
    assert set(drawn(near, source, family, 10)) == {"n2a"}


def test_no_connection_fails_while_endpoints_come_and_go(near: Together) -> None:
    source = near["n1a"]
    stop = threading.Event()

    def change() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            near.members = [["n1b", "n1c"], ["n1c", "n2a"], ["n1b"], ["n2a", "n1b"]][number % 4]
            near.write_mesh()
            time.sleep(0.03)

    changing = threading.Thread(target=change)
    changing.start()
    try:
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            passes(near, source, VIPS[4], 80)
    finally:
        stop.set()
        changing.join()
    near.serve_by("n1b", "n1c")


def test_a_socket_that_was_led_in_vain_may_be_used_again(near: Together, family: Family) -> None:
    source = near["n1a"]
    refused(near, source, VIPS[family], MISSING)  # by the agent, which then offers
    with near.make_socket(source, family) as sock:
        sock.setblocking(True)
        with pytest.raises(ConnectionRefusedError):
            sock.connect((VIPS[family], MISSING))
        address = near["n1b"].address(family)
        sock.connect((address, server.ECHO))
        echo(sock)
        assert sock.getpeername()[:2] == (address, server.ECHO)


def test_a_pod_that_keeps_to_hbone_is_reached_through_the_agent(
    near: Together, family: Family
) -> None:
    source, target = near["n1a"], near["n1c"]
    near.agents[1].attach(target, "--same-node", "hbone")
    try:
        drawn(near, source, family, 8)
        before = decided(near)
        found = drawn(near, source, family, 40)
        after = decided(near)
        assert set(found) == {"n1b", "n1c"}
        assert after["led"] - before["led"] == found["n1b"]
        assert 8 <= found["n1b"] <= 32
    finally:
        near.agents[1].attach(target, "--same-node", "kernel")


def test_services_answer_for_the_lease_without_the_agent(near: Together, family: Family) -> None:
    source = near["n1a"]
    connect_led(near, source, family).close()
    with near.agents[1].dead():
        for _ in range(5):
            passes(near, source, VIPS[family], 80)
        time.sleep(LEASE_S + 0.3)
        refused(near, source, VIPS[family], 80)
    connect_led(near, source, family).close()


def test_connections_are_counted_under_the_service(near: Together) -> None:
    source = near["n1d"]
    connect_led(near, source, 4, server.SINK).close()
    time.sleep(2.5)
    before = _opened(near)
    for _ in range(5):
        with near.connect(source, VIPS[4], server.SINK) as sock:
            sock.sendall(b"x" * 1000)
            sock.shutdown(socket.SHUT_WR)
            receive_all(sock)

    def told() -> bool:
        after = _opened(near)
        return [after[name] - before[name] for name in ("source", "destination")] == [5, 5]

    eventually("both ends count five", told, 8.0)


def _opened(bed: Testbed) -> Counter[str]:
    """Connections that n1d has opened to the service, by reporter."""
    from urllib.request import urlopen

    def read() -> str:
        with urlopen("http://127.0.0.1:15020/metrics", timeout=5) as answer:
            text: str = answer.read().decode()
            return text

    found: Counter[str] = Counter()
    for line in inside(bed.node_netns(1), read).splitlines():
        if not line.startswith("istio_tcp_connections_opened_total{"):
            continue
        if 'source_workload="n1d"' in line and f'destination_service="{HOST}"' in line:
            reporter = line.partition('reporter="')[2].partition('"')[0]
            found[reporter] += int(float(line.rpartition(" ")[2]))
    return found
