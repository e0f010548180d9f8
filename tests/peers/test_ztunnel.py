"""A meshbpf node and a ztunnel node in one mesh: their pods reach each other both ways.

Run with ZTUNNEL=PATH of a build that has `--features testing`. Node 1 is
meshbpf's, node 2 is ztunnel's, and both issue from ztunnel's test CA.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.netns.talk import MARKER, echo, passes, whoami
from tests.peers.ztunnel import Ztunnel, deny_greeting, find_build, greeting
from tests.progs import server
from tests.progs.pod import Family, Pod
from tests.progs.sniffer import Sniffer
from tests.testbed import MESHBPF, Testbed

pytestmark = [pytest.mark.peer, pytest.mark.root, pytest.mark.netns, pytest.mark.interop]

STREAM_BYTES = 32 << 20


@pytest.fixture(scope="module")
def mixed() -> Iterator[tuple[Testbed, Ztunnel]]:
    """Pods n1a, n1b and n1c are meshbpf's; n2a and n2b are ztunnel's.

    A policy denies port GREET to the accounts of n1a, n1b and n2b: what passes there
    tells which identity the far side has seen.
    """
    build = find_build()
    if build is None or build.root_cert is None:
        pytest.skip("needs ZTUNNEL=PATH with its source tree, or ZTUNNEL_CA=DIR beside it")
    with Testbed("bnm") as bed, Ztunnel(bed, 2, build) as ztunnel:
        bed.add_pod("n1c", 1, account="spare")
        # In the file before anybody reads it: ztunnel does so once.
        deny_greeting(bed, "n1a", "n2b")
        bed.write_mesh()
        files = ["--cert", str(build.root_cert), "--key", str(build.root_key)]
        bed.run(bed.node_netns(1), [str(MESHBPF), "ca", "import", str(bed.ca_dir), *files])
        ztunnel.start()
        bed.agents[1].start()
        bed.start_servers()
        for pod in bed.captured:
            (ztunnel if pod.node == 2 else bed.agents[1]).attach(pod)
        yield bed, ztunnel


@pytest.fixture
def bed(mixed: tuple[Testbed, Ztunnel]) -> Testbed:
    return mixed[0]


@pytest.fixture(params=[("n1a", "n2a"), ("n2a", "n1a")], ids=["to ztunnel", "to meshbpf"])
def ends(request: pytest.FixtureRequest, bed: Testbed) -> tuple[Pod, Pod]:
    client, target = request.param
    return bed[client], bed[target]


def test_a_pod_reaches_the_other_kind_over_hbone_alone(
    bed: Testbed, ends: tuple[Pod, Pod], family: Family
) -> None:
    client, target = ends
    with Sniffer(bed.node_netns(1), "trunk", (MARKER,)) as sniffer:
        passes(bed, client, target.address(family))
    assert sniffer.seen.tcp_service_ports() == {15008}
    assert sniffer.seen.plaintext == []


def test_a_service_address_leads_to_the_other_kind(
    bed: Testbed, ends: tuple[Pod, Pod], family: Family
) -> None:
    client, target = ends
    passes(bed, client, target.vip(family), 80)


def test_megabytes_go_both_ways_at_once_unharmed(
    bed: Testbed, ends: tuple[Pod, Pod], family: Family
) -> None:
    client, target = ends
    size = str(STREAM_BYTES)
    bed.client(client, "exchange", target.address(family), server.EXCHANGE, "--bytes", size)


def test_half_close_by_either_side_is_passed_on(bed: Testbed, ends: tuple[Pod, Pod]) -> None:
    client, target = ends
    with bed.connect(client, target.ipv4, server.FAREWELL) as sock:
        assert sock.recv(100) == b"bye\n"
        assert sock.recv(100) == b""
        sock.sendall(b"still talking")
    closed = bed.servers[target.name].wait_event("closed", service="farewell", peer=client.ipv4)
    assert closed["text"] == "still talking"


def test_the_server_sees_the_client_s_own_address(
    bed: Testbed, ends: tuple[Pod, Pod], family: Family
) -> None:
    client, target = ends
    seen = whoami(bed, client, target.address(family))
    assert seen["peer"] == client.address(family)
    assert seen["local"] == target.address(family)


@pytest.mark.parametrize(
    ("denied", "allowed", "target"),
    [("n1a", "n1c", "n2a"), ("n2b", "n2a", "n1a")],
    ids=["ztunnel decides", "meshbpf decides"],
)
def test_policy_knows_the_other_kind_s_identities(
    bed: Testbed, family: Family, denied: str, allowed: str, target: str
) -> None:
    address = bed[target].address(family)
    assert greeting(bed, bed[denied], address) == b""
    passes(bed, bed[denied], address, server.ECHO)
    assert greeting(bed, bed[allowed], address).startswith(b"220 ")


def test_each_side_names_the_identity_that_the_other_has_proven(
    mixed: tuple[Testbed, Ztunnel], family: Family
) -> None:
    bed, ztunnel = mixed
    ours, theirs = bed["n1c"], bed["n2a"]
    with bed.connect(ours, theirs.address(family), server.ECHO) as sock:
        echo(sock)
        outbound = [one for one in bed.agents[1].carried() if one.direction == "outbound"]
    assert {(one.pod, one.peer_identity) for one in outbound} == {(ours.key, theirs.identity)}
    with bed.connect(theirs, ours.address(family), server.ECHO) as sock:
        echo(sock)
        inbound = [one for one in bed.agents[1].carried() if one.direction == "inbound"]
    assert {(one.pod, one.peer_identity) for one in inbound} == {(ours.key, theirs.identity)}
    told = [line for line in ztunnel.log().splitlines() if 'direction="inbound"' in line]
    assert any(f'src.identity="{ours.identity}"' in line for line in told)
