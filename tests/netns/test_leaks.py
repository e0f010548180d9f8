"""After attach and detach rounds and many connections everything is back where it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.netns.talk import passes
from tests.netns.traces import (
    Footprint,
    Objects,
    bpf_objects,
    differences,
    held_by,
    left_over,
    network_state,
)
from tests.progs.pod import Pod
from tests.progs.program import eventually
from tests.progs.server import ECHO
from tests.testbed import SUITE_TAG, Testbed

pytestmark = [pytest.mark.root, pytest.mark.netns]


@pytest.fixture(scope="module")
def quiet() -> Iterator[tuple[Testbed, Pod]]:
    """Agents that nothing else is asked of, and a pod that comes and goes."""
    with Testbed(f"{SUITE_TAG}leak") as bed:
        spare = bed.add_pod("n1s", 1)
        bed.start_agents()
        bed.start_servers()
        bed.attach_all()
        bed.agents[1].detach(spare)
        yield bed, spare


@pytest.mark.parametrize(
    ("rounds", "connections"),
    [
        pytest.param(10, 500, id="small"),
        pytest.param(200, 10_000, id="full", marks=pytest.mark.slow),
    ],
)
def test_nothing_is_left_of_rounds_and_connections(
    quiet: tuple[Testbed, Pod], rounds: int, connections: int
) -> None:
    bed, spare = quiet
    # Warm: pools, caches and allocator arenas that are meant to stay exist.
    _use(bed, spare, 2, 300)
    pids = tuple(agent.pid for agent in bed.agents.values())
    objects = bpf_objects()
    networks = {name: network_state(name) for name in (spare.netns, bed.node_netns(1))}
    before = {pid: Footprint.of(pid) for pid in pids}
    _use(bed, spare, rounds, connections)

    def settled() -> bool:
        return all(
            (now.descriptors, now.threads, now.objects)
            <= (before[pid].descriptors, before[pid].threads, before[pid].objects)
            for pid, now in ((pid, Footprint.of(pid)) for pid in pids)
        )

    eventually(f"descriptors and threads are back at {before}", settled, 10.0)
    after = {pid: Footprint.of(pid) for pid in pids}
    agent_ids = tuple(agent.agent_id() for agent in bed.agents.values())

    def left() -> Objects:
        # What agents hold by descriptor was counted above: programs for pods to come,
        # which are others after each round.
        held = frozenset().union(*map(held_by, pids))
        return left_over(objects, pids, agent_ids) - held

    # Several looks: other agents of this machine may be starting or ending.
    eventually("no BPF object is left", lambda: not left(), 10.0)
    for name, state in networks.items():
        assert differences(state, network_state(name)) == {}
    for pid in pids:
        assert after[pid].resident_bytes - before[pid].resident_bytes < 12 << 20


def _use(bed: Testbed, spare: Pod, rounds: int, connections: int) -> None:
    agent, target = bed.agents[1], bed["n2a"]
    for number in range(rounds):
        agent.attach(spare)
        passes(bed, spare, target.address(6 if number % 2 else 4))
        agent.detach(spare)
    options = ("--connections", str(connections), "--at-once", "50")
    bed.client(bed["n1a"], "many", target.ipv4, ECHO, *options, limit_s=300)
    eventually("all connections are closed", lambda: not agent.carried(), 10.0)
