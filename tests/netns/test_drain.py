"""The orderly end of an agent: what may go on, for how long, and what is told to whom."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshbpf.agent.api import StatusRequest
from tests.netns.talk import echo, ends, passes, refused
from tests.progs import server
from tests.progs.program import eventually
from tests.testbed import SUITE_TAG, Agent, Testbed

pytestmark = [pytest.mark.root, pytest.mark.netns]

DEADLINE_S = 2.0
OPTIONS = ("--termination-deadline", f"{DEADLINE_S}s")


@pytest.fixture(scope="module")
def bed() -> Iterator[Testbed]:
    with Testbed(f"{SUITE_TAG}drn") as bed:
        bed.start_agents(*OPTIONS)
        bed.start_servers()
        bed.attach_all()
        yield bed


@pytest.fixture
def agent(bed: Testbed) -> Iterator[Agent]:
    """Of node 1; there is another one after the test."""
    agent = bed.agents[1]
    yield agent
    if not agent.running:
        agent.start(*OPTIONS)


def test_after_sigterm_a_stream_has_the_deadline_and_is_then_cut(
    bed: Testbed, agent: Agent
) -> None:
    """In both directions; nothing new is taken."""
    out = bed.connect(bed["n1a"], bed["n2a"].ipv4, server.ECHO)
    into = bed.connect(bed["n2a"], bed["n1a"].ipv4, server.ECHO)
    with out, into:
        echo(out)
        echo(into)
        began = time.monotonic()
        agent.program.send(signal.SIGTERM)
        eventually(
            "it drains",
            lambda: agent.ask(StatusRequest()).draining_until is not None,
            DEADLINE_S,
        )
        assert not agent.ask(StatusRequest()).ready
        refused(bed, bed["n1a"], bed["n2a"].ipv4)
        refused(bed, bed["n2x"], bed["n1a"].ipv4)
        echo(out)
        echo(into)
        assert time.monotonic() - began < DEADLINE_S
        assert ends(out, DEADLINE_S + 2.0)
        assert ends(into, 1.0)
        assert DEADLINE_S - 0.2 < time.monotonic() - began < DEADLINE_S + 2.0
    eventually("it ends", lambda: not agent.running)
    assert agent.stop() == 0


def test_an_agent_without_connections_ends_at_once(bed: Testbed, agent: Agent) -> None:
    """Tunnels that nobody uses are none."""
    passes(bed, bed["n1a"], bed["n2a"].ipv4)
    passes(bed, bed["n2a"], bed["n1a"].ipv4)
    began = time.monotonic()
    assert agent.stop() == 0
    assert time.monotonic() - began < DEADLINE_S


def test_a_second_signal_cuts_the_draining_short(bed: Testbed, agent: Agent) -> None:
    with bed.connect(bed["n1a"], bed["n2a"].ipv4, server.ECHO) as sock:
        echo(sock)
        began = time.monotonic()
        agent.program.send(signal.SIGTERM)
        eventually("it drains", lambda: "draining\tcarried" in agent.program.log.read_text())
        time.sleep(0.1)
        agent.program.send(signal.SIGTERM)
        assert ends(sock, DEADLINE_S)
        assert time.monotonic() - began < DEADLINE_S
    assert agent.stop() == 0


def test_the_limit_of_descriptors_is_the_hard_one(bed: Testbed, agent: Agent) -> None:
    limits = Path(f"/proc/{agent.pid}/limits").read_text().splitlines()
    (line,) = (one for one in limits if one.startswith("Max open files"))
    soft, hard = line.split()[3:5]
    assert soft == hard
