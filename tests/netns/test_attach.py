"""Attach and detach: what goes on, what begins, and that nothing is left."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.talk import MARKER, echo, passes
from tests.netns.traces import differences, network_state
from tests.progs import server
from tests.progs.pod import Family, Pod
from tests.progs.sniffer import Sniffer
from tests.testbed import PINS_DIR, Testbed

pytestmark = [pytest.mark.root, pytest.mark.netns]


@pytest.fixture
def spare(bed: Testbed) -> Iterator[Pod]:
    """A pod on node 1 that the mesh file calls captured, not attached yet."""
    pod = bed.add_pod("n1s", 1)
    bed.wait_mesh()
    bed.start_servers(pod)
    yield pod
    bed.agents[1].cli("detach", "--pod", pod.key)
    bed.remove_pod(pod)
    bed.wait_mesh()


def test_established_connections_survive_an_attach(
    bed: Testbed, family: Family, spare: Pod
) -> None:
    out = bed.connect(spare, bed["n2x"].address(family), server.ECHO)
    to_mesh = bed.connect(spare, bed["n2a"].address(family), server.ECHO)
    into = bed.connect(bed["n2x"], spare.address(family), server.ECHO)
    with out, to_mesh, into:
        for sock in (out, to_mesh, into):
            echo(sock)
        bed.agents[1].attach(spare)
        for sock in (out, to_mesh, into):
            echo(sock, MARKER * 10_000)
            assert bed.agents[1].carried(*sock.getsockname()[:2]) == []
        # A new one is carried: the attach was not idle.
        with bed.connect(spare, bed["n2a"].address(family), server.ECHO) as fresh:
            echo(fresh)
            assert bed.agents[1].carried(*fresh.getsockname()[:2])


def test_captured_connections_survive_another_pods_attach_and_detach(
    bed: Testbed, family: Family, spare: Pod
) -> None:
    across = bed.connect(bed["n1a"], bed["n2a"].address(family), server.ECHO)
    back = bed.connect(bed["n2a"], bed["n1b"].address(family), server.ECHO)
    with across, back:
        for _ in range(3):
            bed.agents[1].attach(spare)
            passes(bed, spare, bed["n2a"].address(family))
            bed.agents[1].detach(spare)
            echo(across)
            echo(back)


def test_a_second_attach_changes_nothing(bed: Testbed, family: Family, spare: Pod) -> None:
    agent = bed.agents[1]
    agent.attach(spare)
    with bed.connect(spare, bed["n2a"].address(family), server.ECHO) as sock:
        echo(sock)
        before = network_state(spare.netns), network_state(agent.netns)
        agent.attach(spare)
        after = network_state(spare.netns), network_state(agent.netns)
        assert [differences(*pair) for pair in zip(before, after, strict=True)] == [{}, {}]
        echo(sock)
    assert agent.pod_state(spare.key) == "attached"
    passes(bed, spare, bed["n2a"].address(family))


def test_detach_leaves_no_trace(bed: Testbed, spare: Pod) -> None:
    agent = bed.agents[1]
    pins = _pins(bed)
    before = network_state(spare.netns), network_state(agent.netns)
    agent.attach(spare)
    during = network_state(spare.netns)
    assert differences(before[0], during), "an attach that changes nothing is no attach"
    assert _pins(bed) != pins
    passes(bed, spare, bed["n2a"].ipv4)
    agent.detach(spare)
    after = network_state(spare.netns), network_state(agent.netns)
    assert [differences(*pair) for pair in zip(before, after, strict=True)] == [{}, {}]
    assert _pins(bed) == pins


def test_a_detached_pod_talks_directly_again(bed: Testbed, family: Family, spare: Pod) -> None:
    bed.agents[1].attach(spare)
    passes(bed, spare, bed["n2a"].address(family))
    bed.agents[1].detach(spare)
    with Sniffer(bed.node_netns(1), "trunk", (MARKER,)) as sniffer:
        passes(bed, spare, bed["n2x"].address(family))
        passes(bed, spare, bed["n2a"].address(family))
        passes(bed, bed["n2x"], spare.address(family))
    assert {port for _, _, port in sniffer.seen.dials} == {server.ECHO}


def test_a_second_detach_is_no_error(bed: Testbed, spare: Pod) -> None:
    bed.agents[1].attach(spare)
    bed.agents[1].detach(spare)
    bed.agents[1].detach(spare)


def test_detach_under_load_is_swift_and_clean(bed: Testbed, family: Family, spare: Pod) -> None:
    agent = bed.agents[1]
    before = network_state(spare.netns)
    agent.attach(spare)
    address = bed["n2a"].address(family)
    load = [sys.executable, "-m", "tests.progs.client", "exchange", address, str(server.EXCHANGE)]
    with subprocess.Popen(
        ["nsenter", f"--net=/run/netns/{spare.netns}", *load, "--bytes", str(8 << 30)],
        stdout=subprocess.DEVNULL,
    ) as client:
        try:
            time.sleep(1.0)
            assert client.poll() is None
            began = time.monotonic()
            agent.detach(spare)
            assert time.monotonic() - began < 8.0
            # What the agent carried cannot live on without it: told so, not left hanging.
            assert client.wait(5.0) == 1
        finally:
            client.kill()
    assert differences(before, network_state(spare.netns)) == {}
    passes(bed, spare, address)
    passes(bed, bed["n1a"], address)


def test_two_agents_on_one_host_have_nothing_in_common(bed: Testbed) -> None:
    first, second = bed.agents[1], bed.agents[2]
    assert first.agent_id() != second.agent_id()
    assert {first.agent_id(), second.agent_id()} <= {path.name for path in PINS_DIR.iterdir()}
    assert first.pod_state("apps/n2a") == "unknown"
    assert second.pod_state("apps/n1a") == "unknown"
    second_before = _pins_of(second.agent_id())
    with first.dead():
        passes(bed, bed["n2a"], bed["n2b"].ipv4)
    assert _pins_of(second.agent_id()) == second_before


def test_no_compiler_is_in_the_agents_memory(bed: Testbed) -> None:
    for agent in bed.agents.values():
        maps = Path(f"/proc/{agent.pid}/maps").read_text()
        assert "libssl" in maps, "this reads the right process"
        for name in ("libbcc", "libLLVM", "libclang"):
            assert name not in maps


def _pins(bed: Testbed) -> set[str]:
    return _pins_of(bed.agents[1].agent_id())


def _pins_of(agent_id: str) -> set[str]:
    return {str(path) for path in (PINS_DIR / agent_id).rglob("*")}
