"""DNS of captured pods: the mesh's names from the agent, others from the pod's resolver."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import dns.flags
import dns.message
import dns.query
import dns.rcode
import pytest

from tests.netns.talk import passes
from tests.progs.inside import socket_inside
from tests.progs.pod import Family, Pod
from tests.progs.program import eventually
from tests.progs.resolver import ADDRESS, TEXT, Resolver
from tests.testbed import Testbed

pytestmark = [pytest.mark.root, pytest.mark.netns]


@pytest.fixture
def resolver(bed: Testbed) -> Iterator[Resolver]:
    """In the pod n2x, outside the mesh, on the other node."""
    pod = bed["n2x"]
    with Resolver(pod.netns, pod.ipv4, pod.ipv6) as resolver:
        yield resolver


def ask(
    pod: Pod,
    resolver: str,
    name: str,
    kind: str = "A",
    *,
    tcp: bool = False,
    connected: bool = False,
    limit_s: float = 3.0,
) -> dns.message.Message:
    query = dns.message.make_query(name, kind)
    family = socket.AF_INET6 if ":" in resolver else socket.AF_INET
    transport = socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM
    with socket_inside(pod.netns, family, transport) as sock:
        sock.settimeout(limit_s)
        if tcp:
            sock.connect((resolver, 53))
            return dns.query.tcp(query, resolver, timeout=limit_s, sock=sock)
        if connected:
            sock.connect((resolver, 53))
            sock.send(query.to_wire())
            return dns.message.from_wire(sock.recv(4096))
        # Takes an answer from the resolver's address and port only.
        return dns.query.udp(query, resolver, timeout=limit_s, sock=sock)


def records(answer: dns.message.Message) -> set[str]:
    return {record.to_text() for rrset in answer.answer for record in rrset}


@pytest.mark.parametrize("way", ["udp", "connected", "tcp"])
def test_a_service_is_found_by_its_short_name(
    bed: Testbed, resolver: Resolver, family: Family, way: str
) -> None:
    pod, server = bed["n1a"], bed["n2a"]
    where = bed["n2x"].address(family)
    answer = ask(pod, where, "n2a", tcp=way == "tcp", connected=way == "connected")
    assert records(answer) == {server.vip(4)}
    assert answer.flags & dns.flags.AA
    assert records(ask(pod, where, server.hostname, "AAAA")) == {server.vip(6)}
    assert resolver.asked == [], "the mesh answered"
    passes(bed, pod, server.vip(family), 80)


@pytest.mark.parametrize("tcp", [False, True], ids=["udp", "tcp"])
def test_other_names_are_the_pods_own_resolvers_to_answer(
    bed: Testbed, resolver: Resolver, family: Family, tcp: bool
) -> None:
    pod, where = bed["n1a"], bed["n2x"].address(family)
    assert records(ask(pod, where, "outside.test", tcp=tcp)) == {ADDRESS}
    assert records(ask(pod, where, "outside.test", "TXT", tcp=tcp)) == {f'"{TEXT}"'}
    assert ask(pod, where, "nowhere.test", tcp=tcp).rcode() == dns.rcode.NXDOMAIN
    assert {client for client, _, _ in resolver.asked} == {pod.address(family)}


def test_a_truncated_answer_is_asked_for_again_by_tcp(bed: Testbed, resolver: Resolver) -> None:
    pod, where = bed["n1a"], bed["n2x"].ipv4
    assert ask(pod, where, "long.outside.test", "TXT").flags & dns.flags.TC
    assert len(records(ask(pod, where, "long.outside.test", "TXT", tcp=True))) == 10


def test_a_resolver_that_is_not_there_is_a_server_failure(bed: Testbed) -> None:
    answer = ask(bed["n1a"], bed["n1x"].ipv4, "outside.test")
    assert answer.rcode() == dns.rcode.SERVFAIL
    assert records(ask(bed["n1a"], bed["n1x"].ipv4, "n2a")) == {bed["n2a"].vip(4)}


def test_each_query_is_a_line_at_debug(bed: Testbed, resolver: Resolver) -> None:
    agent, pod, where = bed.agents[1], bed["n1a"], bed["n2x"].ipv4
    agent.cli("log", "--level", "dns=debug")
    try:
        ask(pod, where, "n2a")
        ask(pod, where, "outside.test", "TXT")
        time.sleep(0.3)  # lines are written ten times a second
    finally:
        agent.cli("log", "--reset")
    lines = [line for line in agent.program.log.read_text().splitlines() if "\tdns\t" in line]
    source = "src.workload=n1a src.namespace=apps "
    assert source + "query=A domain=n2a result=success endpoints=1" in lines[-2]
    assert source + "query=TYPE16 domain=outside.test result=forwarded endpoints=0" in lines[-1]


def test_a_pod_outside_the_mesh_asks_for_itself(bed: Testbed, resolver: Resolver) -> None:
    assert ask(bed["n1x"], bed["n2x"].ipv4, "n2a").rcode() == dns.rcode.NXDOMAIN
    assert resolver.names() == ["n2a"]


def test_it_is_switched_per_pod_and_without_another_attach_of_anything_else(
    bed: Testbed, resolver: Resolver
) -> None:
    pod, where = bed["n1b"], bed["n2x"].ipv4
    bed.agents[1].attach(pod, "--no-dns")
    try:
        assert ask(pod, where, "n2a").rcode() == dns.rcode.NXDOMAIN
        assert ask(pod, where, "n2a", tcp=True).rcode() == dns.rcode.NXDOMAIN
    finally:
        bed.agents[1].attach(pod, "--dns")
    assert records(ask(pod, where, "n2a")) == {bed["n2a"].vip(4)}


def test_while_no_agent_answers_the_resolver_does(bed: Testbed, resolver: Resolver) -> None:
    pod, where = bed["n1a"], bed["n2x"].ipv4
    with bed.agents[1].dead():
        time.sleep(0.1)
        assert records(ask(pod, where, "outside.test")) == {ADDRESS}
        assert ask(pod, where, "n2a").rcode() == dns.rcode.NXDOMAIN
    eventually("the agent answers", lambda: records(ask(pod, where, "n2a")) != set(), 5.0)


def test_silent_resolvers_hold_up_nobody_and_their_number_is_bounded(
    bed: Testbed, resolver: Resolver
) -> None:
    pod, where = bed["n1a"], bed["n2x"].ipv4
    with socket_inside(pod.netns, socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for number in range(400):
            query = dns.message.make_query(f"q{number}.silent", "A")
            sock.sendto(query.to_wire(), (where, 53))
            if number % 50 == 49:
                time.sleep(0.05)
        began = time.monotonic()
        assert records(ask(pod, where, "n2a")) == {bed["n2a"].vip(4)}
        assert time.monotonic() - began < 1.0
    assert len([name for name in resolver.names() if name.endswith(".silent")]) <= 256
