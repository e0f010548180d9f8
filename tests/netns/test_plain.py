"""The servers and clients of the testbed with no mesh: they themselves are right.

What fails with agents and passes here is the agents' fault.
"""

from __future__ import annotations

import pytest

from tests.netns.talk import datagram_passes, passes, refused, whoami
from tests.progs.pod import Family
from tests.progs.server import ECHO, EXCHANGE
from tests.progs.sniffer import Sniffer
from tests.testbed import Testbed

pytestmark = [pytest.mark.root, pytest.mark.netns]


def test_every_pod_reaches_every_other_one(plain: Testbed, family: Family) -> None:
    for client in plain.pods.values():
        for other in plain.pods.values():
            passes(plain, client, other.address(family))
            assert whoami(plain, client, other.address(family)) == {
                "server": other.name,
                "peer": client.address(family),
                "local": other.address(family),
            }


def test_datagrams_cross(plain: Testbed, family: Family) -> None:
    datagram_passes(plain["n1a"], plain["n2a"].address(family))


def test_a_closed_port_refuses(plain: Testbed, family: Family) -> None:
    refused(plain, plain["n1a"], plain["n2a"].address(family), 9)


@pytest.mark.parametrize("option", ["", "--edge"])
def test_exchanged_streams_arrive_whole(plain: Testbed, family: Family, option: str) -> None:
    size = str(16 << 20)
    options = ("--bytes", size, *filter(None, [option]))
    plain.client(plain["n1a"], "exchange", plain["n2a"].address(family), EXCHANGE, *options)


def test_many_connections_at_once(plain: Testbed, family: Family) -> None:
    target = plain["n2a"].address(family)
    plain.client(plain["n1a"], "many", target, ECHO, "--connections", "500")


@pytest.mark.parametrize("option", ["--mptcp", "--mapped"])
def test_unusual_sockets(plain: Testbed, option: str) -> None:
    plain.client(plain["n1a"], "echo", plain["n2a"].ipv4, ECHO, option)


def test_the_sniffer_finds_plaintext_between_nodes(plain: Testbed, family: Family) -> None:
    with Sniffer(plain.node_netns(1), "trunk", (b"marker-plaintext",)) as sniffer:
        passes(plain, plain["n1a"], plain["n2a"].address(family))
    assert sniffer.seen.plaintext
    assert sniffer.seen.tcp_service_ports() == {ECHO}
