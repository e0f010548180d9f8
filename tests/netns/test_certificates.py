"""Certificates are renewed at both ends under a connection that does not notice."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from meshbpf.agent.api import CertsRequest
from tests.netns.talk import echo, passes
from tests.progs import server
from tests.progs.pod import Family
from tests.testbed import SUITE_TAG, Agent, Testbed

pytestmark = [pytest.mark.root, pytest.mark.netns]

TTL_S = 4


@pytest.fixture(scope="module")
def short_lived() -> Iterator[Testbed]:
    with Testbed(f"{SUITE_TAG}cert") as bed:
        bed.start_agents("--cert-ttl", f"{TTL_S}s")
        bed.start_servers()
        bed.attach_all()
        yield bed


def test_a_connection_survives_renewal_at_both_ends(short_lived: Testbed, family: Family) -> None:
    bed = short_lived
    with bed.connect(bed["n1a"], bed["n2a"].address(family), server.ECHO) as sock:
        echo(sock)
        before = [_serials(agent) for agent in bed.agents.values()]
        deadline = time.monotonic() + 1.5 * TTL_S
        while time.monotonic() < deadline:
            echo(sock)
            time.sleep(0.1)
        after = [_serials(agent) for agent in bed.agents.values()]
        for old, new in zip(before, after, strict=True):
            assert old.keys() == new.keys()
            # 1.5 lifetimes: the certificates that the tunnel began with have expired.
            assert not old.items() & new.items()
        echo(sock)
        # New tunnels take the new ones: no pod of this pair has spoken before.
        passes(bed, bed["n1b"], bed["n2b"].address(family))


def _serials(agent: Agent) -> dict[str, str]:
    certs = agent.ask(CertsRequest()).certs
    assert certs
    assert all(one.state in ("valid", "renewing") for one in certs)
    return {one.identity: one.serial for one in certs}
