"""While the agent is dead or hangs, a pod fails as its attachment says, and recovers.

Closed: a new connection that would need the agent is refused within a second,
in both directions. Open: it goes round the mesh. What never needs the agent
passes either way: exempt ports, datagrams, destinations outside the mesh (for
as long as the lease lasts), and flows that the kernel carries already.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest

from tests.netns.talk import datagram_passes, echo, ends, passes, receive_all, refused
from tests.progs import server
from tests.progs.pod import Family
from tests.progs.program import eventually
from tests.testbed import Agent, Testbed

pytestmark = [pytest.mark.root, pytest.mark.netns]

# The kernel takes an agent for dead after half a second without a beat.
UNNOTICED_S = 0.8
HBONE = 15008
FAMILIES: tuple[Family, ...] = (4, 6)


@contextlib.contextmanager
def down(agent: Agent, how: str) -> Iterator[None]:
    with agent.dead() if how == "SIGKILL" else agent.hung():
        time.sleep(UNNOTICED_S)
        yield


@pytest.fixture
def open_pod(bed: Testbed) -> Iterator[None]:
    """Pod n1b fails open for the time of the test; n1a fails closed, as is the default."""
    bed.agents[1].attach(bed["n1b"], "--on-agent-down", "open")
    yield
    bed.agents[1].attach(bed["n1b"], "--on-agent-down", "closed")


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_pods_fail_as_they_were_told(bed: Testbed, open_pod: None, how: str) -> None:
    closed, meshed = bed["n1a"], bed["n2a"]
    direct = [bed.connect(closed, bed["n2x"].address(f), server.ECHO) for f in FAMILIES]
    with direct[0], direct[1]:
        for sock in direct:
            echo(sock)
        for family in FAMILIES:
            passes(bed, meshed, closed.address(family))  # a tunnel stands
        with down(bed.agents[1], how):
            for family in FAMILIES:
                _outbound_while_down(bed, family)
                _inbound_while_down(bed, family)
                _what_never_needs_the_agent(bed, family)
            for sock in direct:
                echo(sock)
        for sock in direct:
            echo(sock)
        # No attach was needed for this:
        for family in FAMILIES:
            passes(bed, closed, meshed.address(family))
            passes(bed, meshed, closed.address(family))


def _outbound_while_down(bed: Testbed, family: Family) -> None:
    closed, opened, meshed = bed["n1a"], bed["n1b"], bed["n2a"]
    refused(bed, closed, meshed.address(family))
    refused(bed, closed, meshed.vip(family), 80)
    refused(bed, closed, opened.address(family))
    passes(bed, opened, bed["n2x"].address(family))
    # An open pod reaches the mesh as one that was never attached: in plaintext.
    with bed.connect(opened, meshed.address(family), server.ECHO) as sock:
        echo(sock)
        (carried,) = bed.agents[2].carried(*sock.getsockname()[:2])
        assert (carried.direction, carried.protocol) == ("inbound", "TCP")


def _inbound_while_down(bed: Testbed, family: Family) -> None:
    closed, opened, outside = bed["n1a"], bed["n1b"], bed["n2x"]
    refused(bed, outside, closed.address(family))
    refused(bed, bed["n1x"], closed.address(family))
    refused(bed, outside, closed.address(family), HBONE)
    # A hung agent's tunnels look alive; asking on one of them is refused too.
    refused(bed, bed["n2a"], closed.address(family))
    passes(bed, outside, opened.address(family))


def _what_never_needs_the_agent(bed: Testbed, family: Family) -> None:
    closed, meshed, outside = bed["n1a"], bed["n2a"], bed["n2x"]
    passes(bed, closed, outside.address(family))
    passes(bed, closed, bed["n1x"].address(family))
    datagram_passes(closed, meshed.address(family))
    datagram_passes(outside, closed.address(family))
    passes(bed, outside, closed.address(family), server.EXEMPT)
    passes(bed, closed, meshed.address(family), server.EXEMPT)


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_connections_end_with_their_agent_and_others_live(bed: Testbed, how: str) -> None:
    through = [bed.connect(bed["n1a"], bed["n2a"].address(f), server.ECHO) for f in FAMILIES]
    others = [bed.connect(bed["n2b"], bed["n2a"].address(f), server.ECHO) for f in FAMILIES]
    others += [bed.connect(bed["n1x"], bed["n2a"].address(f), server.ECHO) for f in FAMILIES]
    try:
        for sock in through + others:
            echo(sock)
        agent, mark = bed.agents[1], bed.servers["n2a"].mark()
        began = time.monotonic()
        if how == "SIGKILL":
            agent.kill9()
        else:
            assert agent.stop() == 0
        for sock in through:
            assert ends(sock, 2.0)
        assert time.monotonic() - began < 2.0
        eventually(
            "the server's ends of both connections end too",
            lambda: len(bed.servers["n2a"].events("closed", mark, service="echo")) == 2,
        )
        agent.start(*agent.options)
        for sock in others:
            echo(sock)
    finally:
        for sock in through + others:
            sock.close()
    for family in FAMILIES:
        passes(bed, bed["n1a"], bed["n2a"].address(family))


def test_a_connection_survives_its_agents_pause(bed: Testbed, family: Family) -> None:
    with bed.connect(bed["n1a"], bed["n2a"].address(family), server.ECHO) as sock:
        echo(sock)
        with down(bed.agents[1], "SIGSTOP"):
            sock.sendall(b"while it sleeps")
        sock.settimeout(5)
        assert sock.recv(100) == b"while it sleeps"
        echo(sock)


def test_an_agent_takes_its_pods_over_again(bed: Testbed) -> None:
    agent = bed.agents[1]
    before = {pod: agent.pod_state(pod) for pod in ("apps/n1a", "apps/n1b")}
    assert set(before.values()) == {"attached"}
    with agent.dead():
        pass
    assert {pod: agent.pod_state(pod) for pod in before} == before
    for family in FAMILIES:
        passes(bed, bed["n1a"], bed["n2a"].address(family))
        passes(bed, bed["n2a"], bed["n1a"].address(family))


def test_an_agent_says_in_three_ways_that_it_is_ready(bed: Testbed) -> None:
    agent = bed.agents[1]
    with bed.connect(1, "127.0.0.1", 15021) as sock:
        sock.sendall(b"GET /healthz/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert receive_all(sock).startswith(b"HTTP/1.1 200 ")
    assert agent.cli("status", check=False).returncode == 0
    assert "\tready" in agent.program.log.read_text()
    with agent.dead():
        assert agent.cli("status", check=False).returncode == 69
