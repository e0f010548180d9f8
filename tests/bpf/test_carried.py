"""What the kernel carries under verdicts, on a bridge: the programs, without an agent's brain."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from meshbpf.agent.datapath.flowcodecs import VerdictKey
from meshbpf.agent.datapath.netns import Netns
from meshbpf.agent.datapath.steering import OnAgentDown, PodSteering, Steering
from meshbpf.bpf import MAX_POD_FLOWS, Report
from tests.bpf import lab
from tests.bpf.lab import TinyAgent, dial

HOST = f"{lab.TAG}-brh"
CLIENT, SERVER, STRANGER = 1, 2, 3


def address(number: int, version: int) -> str:
    return f"198.18.46.{number}" if version == 4 else f"fd00:6d62:46::{number}"


def name(number: int) -> str:
    return f"{lab.TAG}-br{number}"


@dataclass
class Bridge:
    """Three pods on one bridge; the first two are attached."""

    steering: Steering
    pods: dict[int, Netns]
    agents: dict[int, TinyAgent]
    indexes: dict[int, int]

    def allow(self, version: int, slot: int = 2) -> None:
        """The first pod may reach the second one's application."""
        key = VerdictKey(
            self.indexes[CLIENT], self.indexes[SERVER],
            ip_address(address(CLIENT, version)), ip_address(address(SERVER, version)),
            lab.APP_PORT,
        )  # fmt: skip
        self.steering.flows.allow(key, slot)

    def dial(self, version: int) -> str:
        return dial(self.pods[CLIENT], address(SERVER, version), timeout_s=1.5)

    def decided(self, what: str) -> int:
        return self.steering.statistics().decisions[what]


@pytest.fixture(scope="module")
def namespaces() -> Iterator[dict[int, Netns]]:
    with contextlib.ExitStack() as stack:
        for each in (HOST, *map(name, (CLIENT, SERVER, STRANGER))):
            lab.remove(each)
        lab.add_host(HOST)
        stack.callback(lab.remove, HOST)
        lab.ip(HOST, "link", "add", "br0", "type", "bridge")
        lab.ip(HOST, "link", "set", "br0", "up")
        pods = {}
        for number in (CLIENT, SERVER, STRANGER):
            pod = name(number)
            lab.run("ip", "netns", "add", pod)
            stack.callback(lab.remove, pod)
            lab._no_dad(pod)
            lab.ip(pod, "link", "set", "lo", "up")
            pair = ("type", "veth", "peer", "eth0", "netns", pod)
            lab.run("ip", "link", "add", f"{lab.TAG}b{number}", "netns", HOST, *pair)
            lab.ip(pod, "addr", "add", f"{address(number, 4)}/24", "dev", "eth0")
            lab.ip(pod, "addr", "add", f"{address(number, 6)}/64", "dev", "eth0", "nodad")
            lab.ip(pod, "link", "set", "eth0", "up")
            lab.ip(HOST, "link", "set", f"{lab.TAG}b{number}", "master", "br0", "up")
            pods[number] = stack.enter_context(lab.opened(pod))
        host = stack.enter_context(lab.opened(HOST))
        stack.enter_context(host.entered())
        yield pods


@pytest.fixture
def bridge(namespaces: dict[int, Netns], cache_dir: Path) -> Iterator[Bridge]:
    with contextlib.ExitStack() as stack:
        agent_id = f"{lab.TAG}-bridge-{time.monotonic_ns()}"
        steering = Steering.open(agent_id=agent_id, cache_dir=cache_dir)
        stack.callback(steering.destroy)
        steering.set_mesh([ip_network(f"198.18.46.{SERVER}/32"), ip_network(address(SERVER, 6))])
        made = Bridge(steering, namespaces, {}, {})
        for number in (CLIENT, SERVER):
            tiny = TinyAgent(steering, namespaces[number])
            tiny.start()
            stack.callback(tiny.stop)
            pod = PodSteering(f"ns/p{number}", namespaces[number])
            made.indexes[number] = steering.attach(pod, tiny.listeners).index
            made.agents[number] = tiny
        stack.enter_context(lab.app(namespaces[SERVER], "server"))
        yield made


@pytest.fixture(params=[4, 6], ids=["v4", "v6"])
def version(request: pytest.FixtureRequest) -> int:
    chosen: int = request.param
    return chosen


def test_a_verdict_leaves_a_connection_to_the_kernel(bridge: Bridge, version: int) -> None:
    assert bridge.dial(version).startswith("OUTBOUND")
    bridge.allow(version)
    assert bridge.dial(version) == f"app server saw {address(CLIENT, version)}"
    assert (bridge.decided("attested"), bridge.decided("kernel_in")) == (1, 1)


def test_a_raised_epoch_of_either_pod_leads_to_the_agent(bridge: Bridge, version: int) -> None:
    for number in (CLIENT, SERVER):
        bridge.allow(version)
        assert bridge.dial(version).startswith("app")
        bridge.steering.flows.raise_epochs([bridge.indexes[number]])
        assert bridge.dial(version).startswith("OUTBOUND")


def test_every_connection_is_answered_while_100_changes_a_second_come(
    bridge: Bridge, version: int
) -> None:
    """Whoever answers: the kernel under the verdict, or the agent in the moment without one."""
    stop = threading.Event()
    changes = [0]

    def change() -> None:
        while not stop.wait(0.005):
            bridge.steering.flows.raise_epochs(bridge.indexes.values())
            if not stop.wait(0.005):
                bridge.allow(version)
            changes[0] += 1

    changer = threading.Thread(target=change)
    changer.start()
    try:
        deadline = time.monotonic() + 2
        # The verdict may go between the client's end and the server's: then it is INBOUND's.
        answers = {"app": 0, "OUTBOUND": 0, "INBOUND": 0}
        while time.monotonic() < deadline:
            answers[bridge.dial(version).partition(" ")[0]] += 1
    finally:
        stop.set()
        changer.join()
    assert answers["app"] > 0
    assert answers["OUTBOUND"] + answers["INBOUND"] > 0
    assert changes[0] > 50


def test_what_is_kept_of_a_connection_ends_with_it(bridge: Bridge, version: int) -> None:
    bridge.allow(version, slot=4)
    for _ in range(3):
        assert bridge.dial(version).startswith("app")
    deadline = time.monotonic() + 3
    while bridge.steering.flows.live() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert bridge.steering.flows.live() == []
    answer = len(f"app server saw {address(CLIENT, version)}")
    counted = bridge.steering.flows.counters(4)
    assert (counted.opened, counted.closed, counted.failed) == (3, 3, 0)
    assert (counted.sent, counted.received) == (3 * len(b"hello"), 3 * answer)


def test_who_answers_for_a_pod_by_forged_arp_gets_no_byte(bridge: Bridge, version: int) -> None:
    """The client's neighbour table says that the stranger has the server's address."""
    bridge.allow(version)
    assert bridge.dial(version).startswith("app")
    client, stranger, target = name(CLIENT), name(STRANGER), address(SERVER, version)
    with bridge.pods[STRANGER].entered():
        mac = _mac("eth0")
    length = "32" if version == 4 else "128"
    more = [] if version == 4 else ["nodad"]
    lab.ip(stranger, "addr", "add", f"{target}/{length}", "dev", "eth0", *more)
    argv = ("neigh", "replace", target, "lladdr", mac, "dev", "eth0", "nud", "permanent")
    lab.ip(client, *argv)
    try:
        with lab.app(bridge.pods[STRANGER], "stranger"):
            before = bridge.decided("spoofed_handshake")
            assert bridge.dial(version) == "ETIMEDOUT"
            assert bridge.decided("spoofed_handshake") > before
            bridge.steering.flows.raise_epochs([bridge.indexes[SERVER]])
            assert bridge.dial(version).startswith("OUTBOUND")  # TLS would tell the agent
    finally:
        lab.ip(client, "neigh", "del", target, "dev", "eth0")
        lab.ip(stranger, "addr", "del", f"{target}/{length}", "dev", "eth0")


def _mac(device: str) -> str:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((device, 0))
        found: bytes = raw.getsockname()[4]
    return found.hex(":")


def test_a_syn_with_data_goes_to_the_agent(bridge: Bridge, version: int) -> None:
    bridge.allow(version)
    lab.sysctl(name(CLIENT), "net/ipv4/tcp_fastopen", str(0x5))
    target = address(SERVER, version)
    with bridge.pods[CLIENT].socket(lab.family_of(target), socket.SOCK_STREAM) as sock:
        sock.settimeout(2)
        sock.sendto(b"hello", socket.MSG_FASTOPEN, (target, lab.APP_PORT))
        assert sock.recv(100).decode().startswith("OUTBOUND")


def test_a_pod_that_has_too_many_goes_through_the_agent(bridge: Bridge, version: int) -> None:
    bridge.allow(version)
    index = bridge.indexes[CLIENT]
    bridge.steering.flows.recount({index: MAX_POD_FLOWS})
    assert bridge.dial(version).startswith("OUTBOUND")
    bridge.steering.flows.recount({index: 0})
    assert bridge.dial(version).startswith("app")


def test_what_is_let_in_without_a_verdict_is_reported_for_judgement(
    bridge: Bridge, version: int
) -> None:
    """As an open pod does while its agent hangs."""
    agent = bridge.agents[SERVER]
    pod = PodSteering(f"ns/p{SERVER}", agent.netns, on_agent_down=OnAgentDown.OPEN)
    bridge.steering.attach(pod, agent.listeners)
    for each in bridge.agents.values():
        each.hang()
    said = dial(bridge.pods[STRANGER], address(SERVER, version))
    assert said == f"app server saw {address(STRANGER, version)}"
    (told,) = bridge.steering.flows.reports()
    assert told.reason is Report.STALE
    assert (told.source, told.destination) == (0, bridge.indexes[SERVER])
    assert str(told.flow.source.ip) == address(STRANGER, version)


def test_a_detach_ends_flows_and_forgets_them(bridge: Bridge, version: int) -> None:
    bridge.allow(version)
    target = address(SERVER, version)
    with bridge.pods[CLIENT].socket(lab.family_of(target), socket.SOCK_STREAM) as sock:
        sock.settimeout(2)
        sock.connect((target, lab.APP_PORT))
        assert len(bridge.steering.flows.live()) == 1
        bridge.steering.detach(f"ns/p{SERVER}")
        assert bridge.steering.flows.live() == []
        with pytest.raises(ConnectionError):
            sock.recv(1)
