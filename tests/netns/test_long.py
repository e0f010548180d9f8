"""The long cases: five GiB on one stream each way, ten thousand streams on one tunnel."""

from __future__ import annotations

import pytest

from tests.netns.talk import passes
from tests.progs import server
from tests.progs.pod import Family
from tests.progs.sniffer import Sniffer
from tests.testbed import Testbed

pytestmark = [pytest.mark.root, pytest.mark.netns, pytest.mark.slow]


def test_five_gib_each_way_on_one_stream_arrive_whole(bed: Testbed, family: Family) -> None:
    """More than four GiB: a 32-bit count anywhere on the way would show."""
    size, address = str(5 << 30), bed["n2a"].address(family)
    options = ("--bytes", size, "--timeout", "60")
    bed.client(bed["n1a"], "exchange", address, server.EXCHANGE, *options, limit_s=900)


def test_ten_thousand_streams_go_through_one_tunnel(bed: Testbed, family: Family) -> None:
    source, destination = bed["n1a"], bed["n2b"]
    address = destination.address(family)
    passes(bed, source, address)
    with Sniffer(bed.node_netns(1), "trunk") as sniffer:
        options = ("--connections", "10000", "--at-once", "40")
        bed.client(source, "many", address, server.ECHO, *options, limit_s=300)
    assert sniffer.seen.dials == {}
