"""'Not in the mesh' is believed only as long as the last state's lease lasts."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.netns.talk import datagram_passes, echo, passes, refused
from tests.progs import server
from tests.progs.pod import Family
from tests.testbed import SUITE_TAG, Testbed

pytestmark = [pytest.mark.root, pytest.mark.netns]

LEASE_S = 3


@pytest.fixture(scope="module", params=["auto", "tc"])
def leased(request: pytest.FixtureRequest) -> Iterator[Testbed]:
    with Testbed(f"{SUITE_TAG}lease") as bed:
        exempt = [("--exempt-cidr", bed["n2x"].address(family)) for family in (4, 6)]
        lease = ("--lease", f"{LEASE_S}s", "--capture", request.param)
        bed.start_agents(*lease, *(word for option in exempt for word in option))
        bed.start_servers()
        bed.attach_all()
        bed.agents[1].attach(bed["n1b"], "--on-agent-down", "open")
        yield bed


def test_destinations_outside_the_mesh_pass_until_the_lease_expires(leased: Testbed) -> None:
    bed = leased
    families: tuple[Family, ...] = (4, 6)
    closed, opened, outside, exempt = bed["n1a"], bed["n1b"], bed["n1x"], bed["n2x"]
    established = [bed.connect(closed, outside.address(f), server.ECHO) for f in families]
    try:
        with bed.agents[1].dead():
            died = time.monotonic()
            for family in families:
                passes(bed, closed, outside.address(family))
            assert time.monotonic() - died < LEASE_S - 0.5, "too slow to say anything"
            time.sleep(died + LEASE_S + 0.7 - time.monotonic())
            for family, sock in zip(families, established, strict=True):
                refused(bed, closed, outside.address(family))
                passes(bed, closed, exempt.address(family))
                passes(bed, opened, outside.address(family))
                datagram_passes(closed, outside.address(family))
                echo(sock)
        for family in families:
            passes(bed, closed, outside.address(family))
    finally:
        for sock in established:
            sock.close()
