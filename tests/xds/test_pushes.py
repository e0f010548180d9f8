"""A hundred policy pushes a second: new connections hardly notice, and no verdict is ever stale."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator

import pytest

from meshbpf.agent.api import PoliciesRequest
from tests.bench import load
from tests.netns import talk
from tests.progs.program import eventually
from tests.progs.server import ECHO
from tests.telemetry.web import Web
from tests.testbed import SUITE_TAG
from tests.xds import records, serve
from tests.xds.controlled import ControlledBed

pytestmark = [pytest.mark.xds, pytest.mark.slow]

PUSHES_PER_S = 100
WINDOWS = 5
WINDOW_S = 6
"""Five windows make 30 s with pushes, and as many without."""
CONNECTIONS_PER_S = 100
OPEN = 50
"""Connections that stand meanwhile, to be judged again and again."""
PACE = load.Task(
    "pace", "new connections", "pace", (str(CONNECTIONS_PER_S),),
    "p99_us", "us", "connections", 1e6, "CPU us each", less_is_better=True,
)  # fmt: skip
MESSAGES = 'istio_xds_message_total{url="type.googleapis.com/istio.security.Authorization"}'


@pytest.fixture(scope="module")
def bed() -> Iterator[ControlledBed]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    with ControlledBed(f"{SUITE_TAG}push") as bed:
        bed.prepare()
        (bed.control / "churn-of").write_text(bed["n2a"].namespace)
        bed.start_agents()
        bed.start_servers(bed["n1b"], bed["n2b"])
        load.serve(bed, bed["n2a"])
        bed.attach_all()
        yield bed


def churn(bed: ControlledBed, per_s: int) -> None:
    (bed.control / "churn.new").write_text(str(per_s))
    (bed.control / "churn.new").replace(bed.control / "churn")


def received(bed: ControlledBed, node: int) -> float:
    name, _, labels = MESSAGES.partition("{")
    return Web(bed).metrics(node)[name].get("{" + labels, 0.0)


def test_the_slowest_new_connections_take_at_most_twice_as_long(bed: ControlledBed) -> None:
    client, server = bed["n1a"], bed["n2a"]
    load.measure(bed, client, server.ipv4, PACE, 1.0)
    quiet: list[float] = []
    pushed: list[float] = []
    standing = [bed.connect(client, bed["n2b"].ipv4, ECHO) for _ in range(OPEN)]
    try:
        arrived = 0.0
        for _ in range(WINDOWS):
            quiet.append(load.measure(bed, client, server.ipv4, PACE, WINDOW_S)["p99_us"])
            before = received(bed, 2)
            churn(bed, PUSHES_PER_S)
            began = time.monotonic()
            pushed.append(load.measure(bed, client, server.ipv4, PACE, WINDOW_S)["p99_us"])
            churn(bed, 0)
            arrived += (received(bed, 2) - before) / (time.monotonic() - began)
            time.sleep(1.2)  # the second that the control plane has begun
        for sock in standing:
            talk.echo(sock)
    finally:
        churn(bed, 0)
        for sock in standing:
            sock.close()
    print(f"p99 quiet {quiet}, with pushes {pushed} us; {arrived / WINDOWS:.0f} pushes/s")
    # What changes while a push is being sent goes into the next one; most come alone.
    assert arrived / WINDOWS > PUSHES_PER_S / 2
    assert statistics.median(pushed) <= 2 * statistics.median(quiet)


def test_a_denial_in_the_midst_of_pushes_holds_from_the_moment_it_is_in_force(
    bed: ControlledBed,
) -> None:
    """On the path that the kernel carries (n1b) and on the one through the agents (n2b)."""
    client = bed["n1a"]
    churn(bed, PUSHES_PER_S)
    try:
        for number in range(10):
            name = f"{client.namespace}/no-{number}"
            who = client.identity.removeprefix("spiffe://")
            deny = records.policy(f"no-{number}", who, namespace=client.namespace, action=1)
            serve.write(bed.control, "authorization", name, deny)
            eventually("the denial is in force", lambda name=name: all(_known(bed, name)), 5.0)
            for pod in ("n1b", "n2b"):
                talk.refused(bed, client, bed[pod].ipv4)
            serve.path_of(bed.control, "authorization", name).unlink()
            eventually("it is gone", lambda name=name: not any(_known(bed, name)), 5.0)
            for pod in ("n1b", "n2b"):
                talk.passes(bed, client, bed[pod].ipv4)
    finally:
        churn(bed, 0)


def _known(bed: ControlledBed, name: str) -> list[bool]:
    """Whether each node has the policy in force."""
    return [
        any(f"{one.namespace}/{one.name}" == name for one in agent.ask(PoliciesRequest()).policies)
        for agent in bed.agents.values()
    ]
