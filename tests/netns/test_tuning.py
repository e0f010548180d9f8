"""Sockets and tunnels are tuned as the settings say, on every leg of a connection."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest

from meshbpf.agent.api import StatusRequest
from tests.netns.talk import echo
from tests.progs import server
from tests.progs.pod import Family, Pod
from tests.progs.program import run_inside
from tests.testbed import SUITE_TAG, Testbed

pytestmark = [pytest.mark.root, pytest.mark.netns]

KEEPALIVE_S = 3000
PROBED = re.compile(r"timer:\(keepalive,(\d+)min")


@pytest.fixture(scope="module")
def tuned() -> Iterator[Testbed]:
    with Testbed(f"{SUITE_TAG}tun") as bed:
        bed.start_agents("--keepalive-time", f"{KEEPALIVE_S}s", "--tunnel-streams", "2")
        bed.start_servers()
        bed.attach_all()
        yield bed


def probed(pod: Pod) -> int:
    """Sockets in the pod's namespace whose next probe is as far off as was asked for."""
    text = run_inside(pod.netns, ["ss", "-Htno", "state", "established"]).stdout
    return sum(KEEPALIVE_S // 60 - 2 <= int(each) <= KEEPALIVE_S // 60 for each in
               PROBED.findall(text))  # fmt: skip


def test_every_socket_of_the_agents_probes_as_it_was_told(tuned: Testbed, family: Family) -> None:
    client, target = tuned["n1a"], tuned["n2a"]
    with tuned.connect(client, target.address(family), server.ECHO) as sock:
        echo(sock)
        time.sleep(0.2)  # what was sent is acknowledged: no other timer runs
        # From the app and to the tunnel; from the tunnel and to the app, whose own has none.
        assert (probed(client), probed(target)) >= (2, 2)


def test_a_tunnel_has_no_more_streams_than_it_was_told(tuned: Testbed, family: Family) -> None:
    client, target = tuned["n1b"], tuned["n2b"]
    socks = [tuned.connect(client, target.address(family), server.ECHO) for _ in range(5)]
    try:
        for sock in socks:
            echo(sock)
        text = run_inside(client.netns, ["ss", "-Htn", "state", "established", "dport = 15008"])
        assert len(text.stdout.splitlines()) >= 3
        assert tuned.agents[1].ask(StatusRequest()).ready
    finally:
        for sock in socks:
            sock.close()
