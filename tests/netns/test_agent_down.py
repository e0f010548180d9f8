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

from tests.netns.talk import datagram_passes, echo, ends, passes, refused
from tests.progs import server
from tests.progs.pod import Family
from tests.testbed import Agent, Testbed

pytestmark = [pytest.mark.root, pytest.mark.netns]

# The kernel takes an agent for dead after half a second without a beat.
UNNOTICED_S = 0.8
HBONE = 15008


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
def test_pods_fail_as_they_were_told(
    bed: Testbed, family: Family, open_pod: None, how: str
) -> None:
    closed, opened, meshed = bed["n1a"], bed["n1b"], bed["n2a"]
    outside = bed["n2x"]
    with bed.connect(closed, outside.address(family), server.ECHO) as direct:
        echo(direct)
        with down(bed.agents[1], how):
            # Outbound.
            refused(bed, closed, meshed.address(family))
            refused(bed, closed, meshed.vip(family), 80)
            refused(bed, closed, opened.address(family))
            passes(bed, opened, outside.address(family))
            # Inbound.
            refused(bed, outside, closed.address(family))
            refused(bed, bed["n1x"], closed.address(family))
            refused(bed, outside, closed.address(family), HBONE)
            if how == "SIGKILL":
                # Streams to a hung agent wait in the tunnels it has: its TCP lives.
                refused(bed, meshed, closed.address(family))
            passes(bed, outside, opened.address(family))
            # What never needs the agent.
            echo(direct)
            passes(bed, closed, outside.address(family))
            passes(bed, closed, bed["n1x"].address(family))
            datagram_passes(closed, meshed.address(family))
            datagram_passes(outside, closed.address(family))
            passes(bed, outside, closed.address(family), server.EXEMPT)
            passes(bed, closed, meshed.address(family), server.EXEMPT)
        echo(direct)
        # No attach was needed for this:
        passes(bed, closed, meshed.address(family))
        passes(bed, meshed, closed.address(family))


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_an_open_pod_reaches_the_mesh_in_plaintext(
    bed: Testbed, family: Family, open_pod: None, how: str
) -> None:
    opened, meshed = bed["n1b"], bed["n2a"]
    with (
        down(bed.agents[1], how),
        bed.connect(opened, meshed.address(family), server.ECHO) as sock,
    ):
        echo(sock)
        (carried,) = bed.agents[2].carried(*sock.getsockname()[:2])
        assert (carried.direction, carried.protocol) == ("inbound", "TCP")
    passes(bed, opened, meshed.address(family))


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_connections_end_with_their_agent_and_others_live(
    bed: Testbed, family: Family, how: str
) -> None:
    through_both = bed.connect(bed["n1a"], bed["n2a"].address(family), server.ECHO)
    within_other = bed.connect(bed["n2b"], bed["n2a"].address(family), server.ECHO)
    into_other = bed.connect(bed["n1x"], bed["n2a"].address(family), server.ECHO)
    with through_both, within_other, into_other:
        for sock in (through_both, within_other, into_other):
            echo(sock)
        agent, mark = bed.agents[1], bed.servers["n2a"].mark()
        began = time.monotonic()
        if how == "SIGKILL":
            agent.kill9()
        else:
            agent.stop()
        assert ends(through_both, 2.0)
        assert time.monotonic() - began < 2.0
        bed.servers["n2a"].wait_event("closed", 3.0, mark, service="echo")
        agent.start(*agent.options)
        echo(within_other)
        echo(into_other)
    passes(bed, bed["n1a"], bed["n2a"].address(family))


def test_a_connection_survives_its_agents_pause(bed: Testbed, family: Family) -> None:
    with bed.connect(bed["n1a"], bed["n2a"].address(family), server.ECHO) as sock:
        echo(sock)
        with down(bed.agents[1], "SIGSTOP"):
            sock.sendall(b"while it sleeps")
        sock.settimeout(5)
        assert sock.recv(100) == b"while it sleeps"
        echo(sock)


def test_an_agent_takes_its_pods_over_again(bed: Testbed, family: Family) -> None:
    agent = bed.agents[1]
    before = {pod: agent.pod_state(pod) for pod in ("apps/n1a", "apps/n1b")}
    with agent.dead():
        pass
    assert {pod: agent.pod_state(pod) for pod in before} == before
    assert set(before.values()) == {"attached"}
    passes(bed, bed["n1a"], bed["n2a"].address(family))
    passes(bed, bed["n2a"], bed["n1a"].address(family))
