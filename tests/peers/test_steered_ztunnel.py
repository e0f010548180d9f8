"""A stock ztunnel on each node serves pods that meshbpf steers: no iptables rule anywhere.

Run with ZTUNNEL=PATH of a build that has `--features testing`. The agents have
no certificates; they hand their pods to ztunnel over ZDS.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from meshbpf.agent.api import PodsRequest, StatusRequest
from tests.netns.talk import MARKER, echo, passes, refused, whoami
from tests.netns.test_dns import ask, records
from tests.peers.ztunnel import (
    Ztunnel,
    deny_greeting,
    find_build,
    greeting,
    start_steering,
    wait_served,
)
from tests.progs import server
from tests.progs.inside import nftables
from tests.progs.pod import Family
from tests.progs.program import eventually
from tests.progs.sniffer import Sniffer
from tests.testbed import Testbed

pytestmark = [pytest.mark.peer, pytest.mark.root, pytest.mark.netns, pytest.mark.interop]

Steered = tuple[Testbed, dict[int, Ztunnel]]


@pytest.fixture(scope="module")
def steered() -> Iterator[Steered]:
    """A policy denies port GREET to the accounts of n1a and n2b."""
    build = find_build()
    if build is None or build.root_cert is None:
        pytest.skip("needs ZTUNNEL=PATH with its source tree, or ZTUNNEL_CA=DIR beside it")
    with Testbed("bzs") as bed:
        bed.add_pod("n1c", 1, account="spare")
        deny_greeting(bed, "n1a", "n2b")
        bed.write_mesh()
        bed.start_servers()
        start_steering(bed)
        # One before its ztunnel is there, the rest after.
        bed.agents[1].attach(bed["n1a"])
        with (
            Ztunnel.of_agent(bed, 1, build) as first,
            Ztunnel.of_agent(bed, 2, build) as second,
        ):
            first.start()
            second.start()
            for pod in bed.captured:
                bed.agent_of(pod).attach(pod)
            for node in (1, 2):
                wait_served(bed, node)
            yield bed, {1: first, 2: second}


@pytest.fixture
def bed(steered: Steered) -> Testbed:
    return steered[0]


def test_pods_of_two_nodes_talk_over_hbone_alone(bed: Testbed, family: Family) -> None:
    with Sniffer(bed.node_netns(1), "trunk", (MARKER,)) as sniffer:
        passes(bed, bed["n1a"], bed["n2a"].address(family))
        passes(bed, bed["n2b"], bed["n1b"].address(family))
    assert sniffer.seen.tcp_service_ports() == {15008}
    assert sniffer.seen.plaintext == []


def test_pods_of_one_node_and_services_are_reached(bed: Testbed, family: Family) -> None:
    passes(bed, bed["n1a"], bed["n1b"].address(family))
    passes(bed, bed["n1a"], bed["n2a"].vip(family), 80)


def test_the_server_sees_the_client_s_own_address(bed: Testbed, family: Family) -> None:
    for client, target in ((bed["n1a"], bed["n2a"]), (bed["n1a"], bed["n1b"])):
        seen = whoami(bed, client, target.address(family))
        assert seen["peer"] == client.address(family)
        assert seen["local"] == target.address(family)


def test_what_is_outside_the_mesh_is_reached_in_the_clear_both_ways(
    bed: Testbed, family: Family
) -> None:
    passes(bed, bed["n1a"], bed["n2x"].address(family))
    with bed.connect(bed["n2x"], bed["n1a"].address(family), server.WHOAMI) as sock:
        assert bed["n2x"].address(family).encode() in sock.recv(1000)


def test_ztunnel_decides_by_policy(bed: Testbed, family: Family) -> None:
    for target in ("n2a", "n1b"):
        address = bed[target].address(family)
        assert greeting(bed, bed["n1a"], address) == b""
        assert greeting(bed, bed["n1c"], address).startswith(b"220 ")


def test_a_pod_that_sets_the_proxy_s_mark_does_not_get_past_it(bed: Testbed) -> None:
    with (
        Sniffer(bed.node_netns(1), "trunk", (MARKER,)) as sniffer,
        bed.make_socket(bed["n1a"], 4) as sock,
    ):
        sock.setsockopt(socket.SOL_SOCKET, 36, 0x539)
        sock.settimeout(5.0)
        sock.connect((bed["n2a"].ipv4, server.ECHO))
        echo(sock)
    assert sniffer.seen.plaintext == []


def test_names_of_the_mesh_are_the_agent_s_to_answer(bed: Testbed) -> None:
    answer = ask(bed["n1a"], bed["n2x"].ipv4, f"{bed['n2a'].hostname}.")
    assert records(answer) == {bed["n2a"].vip(4)}


def test_no_pod_has_a_netfilter_rule(bed: Testbed) -> None:
    for pod in bed.captured:
        assert nftables(pod.netns) == []
        for command in ("iptables-legacy-save", "ip6tables-legacy-save"):
            assert bed.run(pod.netns, [command]).stdout == ""


def test_status_and_explain_name_ztunnel(steered: Steered) -> None:
    bed, ztunnels = steered
    proxy = bed.agents[1].ask(StatusRequest()).proxy
    assert proxy is not None
    assert (proxy.kind, proxy.pid) == ("ztunnel", ztunnels[1].pid)
    said = bed.agents[1].cli("explain", bed["n1a"].key, f"{bed['n2a'].ipv4}:80").stdout
    assert "handed to ztunnel" in said
    pods = bed.agents[1].ask(PodsRequest()).pods
    assert {pod.same_node for pod in pods} == {"hbone"}


def test_without_ztunnel_pods_are_closed_and_with_the_next_one_open(steered: Steered) -> None:
    bed, ztunnels = steered
    ztunnels[1].kill9()
    refused(bed, bed["n1a"], bed["n2a"].ipv4)
    refused(bed, bed["n2x"], bed["n1a"].ipv4)
    passes(bed, bed["n1a"], bed["n2x"].ipv4)
    eventually("it is missed", lambda: not pid_of(bed, 1))
    ztunnels[1].start()
    wait_served(bed, 1)
    passes(bed, bed["n1a"], bed["n2a"].ipv4)
    passes(bed, bed["n2a"], bed["n1a"].ipv6)


def pid_of(bed: Testbed, node: int) -> int:
    proxy = bed.agents[node].ask(StatusRequest()).proxy
    assert proxy is not None
    return proxy.pid


def test_ztunnel_serves_on_while_no_agent_runs(bed: Testbed, family: Family) -> None:
    with bed.connect(bed["n1a"], bed["n2a"].address(family), server.ECHO) as sock:
        echo(sock)
        with bed.agents[1].dead():
            echo(sock)
            passes(bed, bed["n1a"], bed["n2a"].address(family))
            passes(bed, bed["n2b"], bed["n1a"].address(family))
        wait_served(bed, 1)
        echo(sock)
    passes(bed, bed["n1a"], bed["n2a"].address(family))


def test_a_reloaded_agent_takes_ztunnel_over(steered: Steered, family: Family) -> None:
    bed, ztunnels = steered
    with bed.connect(bed["n1a"], bed["n2a"].address(family), server.ECHO) as sock:
        echo(sock)
        bed.agents[1].reload()
        wait_served(bed, 1)
        assert pid_of(bed, 1) == ztunnels[1].pid
        echo(sock)
    passes(bed, bed["n1a"], bed["n2a"].address(family))
    passes(bed, bed["n2a"], bed["n1a"].address(family))


def test_a_detached_pod_is_ztunnel_s_no_more(steered: Steered) -> None:
    bed, _ = steered
    pod = bed["n1c"]
    bed.agents[1].detach(pod)
    try:
        for port in (15001, 15006, 15008):

            def closed(port: int = port) -> bool:
                with bed.make_socket(pod, 4) as sock:
                    return sock.connect_ex((pod.ipv4, port)) != 0

            eventually(f"nobody listens on {port}", closed)
        passes(bed, pod, bed["n2x"].ipv4)
    finally:
        bed.agents[1].attach(pod)
    wait_served(bed, 1)
    passes(bed, pod, bed["n2a"].ipv4)


def test_without_the_connect_hook_ztunnel_serves_under_its_own_address(steered: Steered) -> None:
    """Last: it starts everything anew, with the setting that docs/zds.md asks for."""
    bed, ztunnels = steered
    for node, agent in bed.agents.items():
        agent.stop()
        ztunnels[node].kill9()
        agent.start(*agent.options, "--capture", "tc")
        ztunnels[node].start(ENABLE_ORIG_SRC="false")
        wait_served(bed, node)
    passes(bed, bed["n1a"], bed["n2x"].ipv4)
    with Sniffer(bed.node_netns(1), "trunk", (MARKER,)) as sniffer:
        passes(bed, bed["n1a"], bed["n2a"].ipv6)
        seen = whoami(bed, bed["n1a"], bed["n2a"].ipv4)
    assert sniffer.seen.tcp_service_ports() == {15008}
    assert seen["local"] == bed["n2a"].ipv4
