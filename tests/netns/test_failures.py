"""Ends that are not orderly: resets, refusals, silence, pods that vanish."""

from __future__ import annotations

import socket
import subprocess
import time

import pytest

from tests.netns.talk import close_with_reset, echo, ends, passes, refused
from tests.progs import server
from tests.progs.pod import Family
from tests.progs.program import eventually
from tests.testbed import Testbed

pytestmark = [pytest.mark.root, pytest.mark.netns]


@pytest.mark.parametrize("target", ["n2a", "n1b"])
def test_a_servers_reset_reaches_the_client(bed: Testbed, family: Family, target: str) -> None:
    with bed.connect(bed["n1a"], bed[target].address(family), server.RESET) as sock:
        sock.sendall(b"reset me\n")
        assert ends(sock, 2.0) == "reset"


@pytest.mark.parametrize("target", ["n2a", "n1b"])
def test_a_clients_reset_reaches_the_server(bed: Testbed, family: Family, target: str) -> None:
    sock = bed.connect(bed["n1a"], bed[target].address(family), server.ECHO)
    echo(sock)
    mark = bed.servers[target].mark()
    close_with_reset(sock)
    told = bed.servers[target].wait_event("closed", since=mark, service="echo")
    assert told["end"] == "ConnectionResetError"


@pytest.mark.parametrize("client", ["n1a", "n1b", "n2x"])
def test_a_closed_port_refuses_the_client(bed: Testbed, family: Family, client: str) -> None:
    refused(bed, bed[client], bed["n2a"].address(family), 9)


def test_a_service_port_that_does_not_exist_refuses_the_client(
    bed: Testbed, family: Family
) -> None:
    refused(bed, bed["n1a"], bed["n2a"].vip(family), 4242)


def test_a_destination_that_does_not_answer_ends_the_connection(bed: Testbed) -> None:
    """The connect timeout of the agent's dial (10 s, as ztunnel's) reaches the client."""
    began = time.monotonic()
    first = bed.connect(bed["n1a"], bed.gone.ipv4, server.ECHO)
    second = bed.connect(bed["n1a"], bed.gone.ipv6, server.ECHO)
    with first, second:
        assert ends(first, 15.0) == "reset"
        assert time.monotonic() - began > 5.0
        assert ends(second, 5.0) == "reset"


def test_a_silent_connection_stays_open(bed: Testbed, family: Family) -> None:
    with bed.connect(bed["n1a"], bed["n2a"].address(family), server.SILENT) as sock:
        sock.settimeout(1.5)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        mark = bed.servers["n2a"].mark()
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(5)
        assert sock.recv(1) == b""
    told = bed.servers["n2a"].wait_event("closed", since=mark, service="silent")
    assert told["end"] == "fin"


def test_a_pod_whose_namespace_vanishes_is_let_go(bed: Testbed, family: Family) -> None:
    agent = bed.agents[2]
    pod = bed.add_pod("n2gone", 2)
    try:
        bed.wait_mesh()
        agent.attach(pod)
        bed.start_servers(pod)
        client = bed.connect(bed["n1a"], pod.address(family), server.ECHO)
        other = bed.connect(bed["n1a"], bed["n2a"].address(family), server.ECHO)
        with client, other:
            echo(client)
            echo(other)
            bed.remove_pod(pod)
            # By itself: no detach is needed, and the name may be used again.
            eventually("the agent notices", lambda: _state(bed, pod.key) == "unknown", 5.0)
            assert ends(client, 5.0)
            echo(other)
        passes(bed, bed["n1a"], bed["n2a"].address(family))
        # The namespace itself is gone for good only when the agent lets go of it.
        eventually("nothing holds the namespace", lambda: not _has_veth(bed, pod.veth))
    finally:
        if pod.name in bed.pods:
            bed.remove_pod(pod)
        bed.wait_mesh()


def test_a_pod_may_come_back_in_a_new_namespace(bed: Testbed, family: Family) -> None:
    agent = bed.agents[2]
    for _ in range(2):
        pod = bed.add_pod("n2back", 2)
        try:
            bed.wait_mesh()
            agent.attach(pod)
            bed.start_servers(pod)
            passes(bed, bed["n1a"], pod.address(family))
        finally:
            # Without detach in between: a container runtime asks nobody.
            bed.remove_pod(pod)
    agent.cli("detach", "--pod", pod.key, check=False)


def _state(bed: Testbed, key: str) -> str:
    return bed.agents[2].pod_state(key)


def _has_veth(bed: Testbed, name: str) -> bool:
    netns = bed.node_netns(2)
    found = subprocess.run(
        ["ip", "-n", netns, "link", "show", name], capture_output=True, check=False
    )
    return found.returncode == 0
