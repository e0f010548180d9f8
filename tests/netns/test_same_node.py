"""Connections inside a node, and plaintext into it, are carried by the kernel."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from meshbpf.agent.api import ConnectionInfo, StatusRequest
from tests.netns.talk import MARKER, echo, ends, passes, receive_all, refused
from tests.progs import server
from tests.progs.inside import inside
from tests.progs.packets import SYN, ipv4, ipv6, tcp
from tests.progs.pod import Family, Pod
from tests.progs.program import eventually
from tests.testbed import SUITE_TAG, Testbed

pytestmark = [pytest.mark.root, pytest.mark.netns]

STRICT: list[Any] = [[[{"notPrincipals": [{"Presence": []}]}]]]
LEASE_S = 4.0


@pytest.fixture(scope="module")
def near() -> Iterator[Testbed]:
    """One node matters here; a third captured pod has an account of its own."""
    with Testbed(f"{SUITE_TAG}same") as bed:
        bed.add_pod("n1c", 1)
        bed.start_agents("--lease", f"{LEASE_S:g}s")
        bed.start_servers()
        bed.attach_all()
        yield bed


def decided(bed: Testbed) -> dict[str, int | float]:
    return bed.agents[1].ask(StatusRequest()).statistics["decisions"]


def warm(bed: Testbed, source: Pod, address: str, port: int = server.ECHO) -> None:
    """The first connection of its kind asks the agent; the next is the kernel's."""
    for path in ("", "kernel"):
        with bed.connect(source, address, port) as sock:
            eventually("somebody carries it", lambda sock=sock: carried(bed, sock))
            assert path in ("", carrier(bed, sock))
            if port == server.ECHO:
                echo(sock)


def carried(bed: Testbed, sock: socket.socket) -> list[ConnectionInfo]:
    return bed.agents[1].carried(*sock.getsockname()[:2])


def carrier(bed: Testbed, sock: socket.socket) -> str:
    (path,) = {one.path for one in carried(bed, sock)}
    return path


# --- who carries -----------------------------------------------------------------------


def test_the_second_connection_of_a_pair_does_not_enter_the_agent(
    near: Testbed, family: Family
) -> None:
    source, address = near["n1a"], near["n1b"].address(family)
    warm(near, source, address)
    before = decided(near)
    with near.connect(source, address, server.ECHO) as sock:
        echo(sock, MARKER * 1000)
        found = carried(near, sock)
        assert {(one.direction, one.path, one.peer_identity) for one in found} == {
            ("outbound", "kernel", near["n1b"].identity),
            ("inbound", "kernel", source.identity),
        }
        assert {one.bytes_sent for one in found} == {len(MARKER) * 1000}
        assert sock.getpeername()[:2] == (address, server.ECHO)
    after = decided(near)
    assert after["attested"] == before["attested"] + 1
    assert after["kernel_in"] == before["kernel_in"] + 1
    for agents_own in ("outbound", "inbound", "hbone"):
        assert after[agents_own] == before[agents_own]


def test_plaintext_that_policy_allows_does_not_enter_the_agent_twice(
    near: Testbed, family: Family
) -> None:
    source, address = near["n1x"], near["n1b"].address(family)
    warm(near, source, address)
    with near.connect(source, address, server.ECHO) as sock:
        echo(sock)
        (one,) = carried(near, sock)
        assert (one.direction, one.path, one.peer_identity) == ("inbound", "kernel", "")


def test_bytes_and_connections_are_counted_to_the_last(near: Testbed) -> None:
    source, address = near["n1c"], near["n1b"].ipv4
    warm(near, source, address, server.SINK)
    eventually("what was is told", lambda: not near.agents[1].carried(source.ipv4))
    time.sleep(2.5)
    before = _counted(near)
    for _ in range(5):
        with near.connect(source, address, server.SINK) as sock:
            sock.sendall(b"x" * 10_000)
            sock.shutdown(socket.SHUT_WR)
            answer = len(receive_all(sock))
    expected = {"opened": 5, "closed": 5, "received": 50_000, "sent": 5 * answer}

    def told() -> bool:
        after = _counted(near)
        return {name: after[name] - before[name] for name in after} == expected

    eventually(f"the metrics have {expected}", told, 8.0)


def _counted(bed: Testbed) -> dict[str, int]:
    """The source's series from n1c to n1b."""
    from urllib.request import urlopen

    def read() -> str:
        with urlopen("http://127.0.0.1:15020/metrics", timeout=5) as answer:
            text: str = answer.read().decode()
            return text

    found = {"opened": 0, "closed": 0, "received": 0, "sent": 0}
    for line in inside(bed.node_netns(1), read).splitlines():
        if 'source_workload="n1c"' not in line or 'destination_workload="n1b"' not in line:
            continue
        if 'reporter="source"' not in line:
            continue
        for name, metric in (
            ("opened", "istio_tcp_connections_opened"),
            ("closed", "istio_tcp_connections_closed"),
            ("received", "istio_tcp_received_bytes"),
            ("sent", "istio_tcp_sent_bytes"),
        ):
            if line.startswith(metric):
                found[name] += int(float(line.rpartition(" ")[2]))
    return found


# --- policy ----------------------------------------------------------------------------


def test_a_policy_that_arrives_cuts_what_the_kernel_carries(near: Testbed, family: Family) -> None:
    source, address = near["n1a"], near["n1b"].address(family)
    warm(near, source, address)
    warm(near, near["n1x"], address)
    with (
        near.connect(source, address, server.ECHO) as sock,
        near.connect(near["n1x"], address, server.ECHO) as plain,
    ):
        echo(sock)
        echo(plain)
        with near.policy(action="Deny", rules=[[[{"destinationPorts": [server.ECHO]}]]]):
            assert ends(sock, 2.0) == "reset"
            assert ends(plain, 2.0) == "reset"
            refused(near, source, address)
            refused(near, source, address)
            refused(near, near["n1x"], address)
    warm(near, source, address)


def test_a_policy_tells_pods_of_the_node_apart_by_their_identity(
    near: Testbed, family: Family
) -> None:
    address = near["n1b"].address(family)
    principal = near["n1c"].identity.removeprefix("spiffe://")
    with near.policy(action="Deny", rules=[[[{"principals": [{"Exact": principal}]}]]]):
        for _ in range(2):
            refused(near, near["n1c"], address)
        warm(near, near["n1a"], address)
    with near.policy(action="Deny", rules=STRICT):
        for _ in range(2):
            refused(near, near["n1x"], address)
        warm(near, near["n1c"], address)


def test_connections_pass_while_the_mesh_state_changes_all_the_time(near: Testbed) -> None:
    """Each state raises epochs; the answers stay the same, whoever gives them."""
    source, address = near["n1a"], near["n1b"].ipv4
    warm(near, source, address)
    stop = threading.Event()
    pushes = [0]

    def push() -> None:
        while not stop.is_set():
            pushes[0] += 1
            rules = [[[{"destinationPorts": [1 + pushes[0] % 1000]}]]]
            near.policies[:] = [
                {"name": "busy", "namespace": "apps", "scope": "Namespace", "action": "Deny",
                 "dryRun": False, "rules": rules}
            ]  # fmt: skip
            near.write_mesh()
            time.sleep(0.01)

    with near.connect(source, address, server.ECHO) as lasting:
        pusher = threading.Thread(target=push)
        pusher.start()
        try:
            deadline = time.monotonic() + 3
            while time.monotonic() < deadline:
                passes(near, source, address)
                echo(lasting)
        finally:
            stop.set()
            pusher.join()
            near.policies.clear()
            near.write_mesh()
            near.wait_mesh()
        echo(lasting)
    assert pushes[0] > 3


# --- who one is not ------------------------------------------------------------------------


@pytest.mark.parametrize("impostor", ["uncaptured pod", "captured pod", "host", "other node"])
def test_a_handshake_in_another_pods_name_is_dropped(
    near: Testbed, family: Family, impostor: str
) -> None:
    source, target = near["n1a"], near["n1b"]
    mine, yours = source.address(family), target.address(family)
    warm(near, source, yours)
    with near.connect(source, yours, server.ECHO) as sock:
        echo(sock)
        ports = (sock.getsockname()[1], server.ECHO)
        segment = tcp(mine, yours, SYN, ports=ports, sequence=77)
        packet = ipv4(mine, yours, segment) if family == 4 else ipv6(mine, yours, segment)
        before = decided(near)
        where = {
            "uncaptured pod": near["n1x"].netns,
            "captured pod": near["n1c"].netns,
            "host": near.node_netns(1),
            "other node": near.node_netns(2),
        }[impostor]
        _send_raw(near, where, family, packet, yours)
        name = "spoofed_source" if impostor == "captured pod" else "spoofed_handshake"
        eventually(f"{name} is counted", lambda: decided(near)[name] > before[name], 3.0)
        echo(sock)


def _send_raw(bed: Testbed, netns: str, family: Family, packet: bytes, to: str) -> None:
    """Whole packets, by a raw socket where the kernel fills nothing in."""

    def send() -> None:
        kind = socket.AF_INET if family == 4 else socket.AF_INET6
        with socket.socket(kind, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
            raw.sendto(packet, (to, 0))

    inside(netns, send)


def test_an_address_of_a_dead_pod_gets_no_byte_from_its_next_owner(
    near: Testbed, family: Family
) -> None:
    """The next owner is not captured; the agent has not noticed yet."""
    gone = near.add_pod("n1d", 1)
    near.start_servers(gone)
    near.wait_mesh()
    near.agents[1].attach(gone)
    source, address = near["n1a"], gone.address(family)
    warm(near, source, address)
    with near.agents[1].hung():
        near.servers.pop(gone.name).end()
        near.pods.pop(gone.name)
        near.remove_namespaces(gone)
        heir = near.make_pod("n1d", 1, "spare", captured=False)
        near.start_servers(heir)
        mark = near.servers["n1d"].mark()
        with near.make_socket(source, family) as sock:
            sock.settimeout(1.5)
            with pytest.raises((TimeoutError, ConnectionError)):
                sock.connect((address, server.ECHO))
    told = near.servers["n1d"].events(since=mark)
    assert [one for one in told if one["event"] == "accepted"] == []
    near.remove_pod(heir)
    near.wait_mesh()


# --- life without an agent --------------------------------------------------------------


def test_what_the_kernel_carries_lives_on_without_the_agent(near: Testbed) -> None:
    source, target = near["n1a"], near["n1b"]
    warm(near, source, target.ipv4)
    warm(near, source, target.ipv4, server.EXCHANGE)
    failures: list[BaseException] = []

    def exchange() -> None:
        try:
            size = str(1 << 29)
            options = ("--bytes", size)
            near.client(source, "exchange", target.ipv4, server.EXCHANGE, *options, limit_s=120)
        except BaseException as error:
            failures.append(error)

    stream = threading.Thread(target=exchange)
    stream.start()
    eventually("the stream is open", lambda: bool(near.agents[1].carried(source.ipv4)), 5.0)
    with near.agents[1].dead():
        passes(near, source, target.ipv4, server.ECHO)  # a verdict of before holds
        stream.join(120)
    assert not stream.is_alive()
    assert failures == []


def test_a_verdict_holds_for_the_lease_and_no_longer(near: Testbed, family: Family) -> None:
    source, address = near["n1a"], near["n1b"].address(family)
    warm(near, source, address)
    with near.connect(source, address, server.ECHO) as lasting:
        with near.agents[1].dead():
            passes(near, source, address)
            time.sleep(LEASE_S + 0.3)
            refused(near, source, address)
            echo(lasting)
        assert carrier(near, lasting) == "kernel"  # the next agent took it over
        with near.policy(action="Deny", rules=[[[{"destinationPorts": [server.ECHO]}]]]):
            assert ends(lasting, 2.0) == "reset"


# --- streams -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--edge",)], ids=["blocking", "edge-triggered"])
def test_64_mib_each_way_arrive_whole(
    near: Testbed, family: Family, options: tuple[str, ...]
) -> None:
    address = near["n1b"].address(family)
    warm(near, near["n1a"], address, server.EXCHANGE)
    size = str(64 << 20)
    near.client(near["n1a"], "exchange", address, server.EXCHANGE, "--bytes", size, *options)


def test_a_half_closed_stream_arrives_whole(near: Testbed, family: Family) -> None:
    address = near["n1b"].address(family)
    warm(near, near["n1a"], address, server.SINK)
    with near.connect(near["n1a"], address, server.SINK) as sock:
        assert carrier(near, sock) == "kernel"
        sock.sendall(MARKER * 5000)
        sock.shutdown(socket.SHUT_WR)
        assert str(len(MARKER) * 5000).encode() in receive_all(sock)


# --- comings and goings ---------------------------------------------------------------------


def test_a_detach_ends_the_flows_and_another_attach_begins_anew(
    near: Testbed, family: Family
) -> None:
    source, target = near["n1a"], near["n1c"]
    address = target.address(family)
    warm(near, source, address)
    with near.connect(source, address, server.ECHO) as sock:
        echo(sock)
        near.agents[1].detach(target)
        assert ends(sock, 2.0) == "reset"
    refused(near, source, address)  # the mesh state still says HBONE; nobody speaks it there
    near.agents[1].attach(target)
    warm(near, source, address)


def test_a_pod_may_have_its_connections_in_tunnels(near: Testbed, family: Family) -> None:
    source, target = near["n1a"], near["n1c"]
    near.agents[1].attach(target, "--same-node", "hbone")
    try:
        for _ in range(2):
            with near.connect(source, target.address(family), server.ECHO) as sock:
                echo(sock)
                (out,) = (one for one in carried(near, sock) if one.direction == "outbound")
                assert (out.protocol, out.path) == ("HBONE", "agent")
    finally:
        near.agents[1].attach(target, "--same-node", "kernel")
    warm(near, source, target.address(family))
