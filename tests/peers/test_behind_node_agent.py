"""meshbpf's proxy behind a node agent that captures with Istio's iptables rules, over ZDS.

The node agent's end is `ZdsServer`, and the rules are those by which a stock
ztunnel is served in the same bed: nothing in a pod is ours but listeners.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator

import pytest

from meshbpf.agent.api import StatusRequest
from tests.netns.talk import MARKER, echo, passes, refused, whoami
from tests.netns.test_dns import ask, records
from tests.peers.zds import ZdsServer
from tests.peers.ztunnel import deny_greeting, redirect, zds_socket
from tests.progs import server
from tests.progs.inside import NETNS_DIR
from tests.progs.pod import Family, Pod
from tests.progs.program import eventually
from tests.progs.sniffer import Sniffer
from tests.telemetry.web import Web
from tests.testbed import Testbed

pytestmark = [pytest.mark.peer, pytest.mark.root, pytest.mark.netns]

Handed = tuple[Testbed, dict[int, ZdsServer]]


@pytest.fixture(scope="module")
def handed() -> Iterator[Handed]:
    """A policy denies port GREET to the account of n1a and n1b."""
    if shutil.which("iptables-restore") is None:
        pytest.skip("needs iptables-restore")
    with Testbed("bzc") as bed, contextlib.ExitStack() as stack:
        deny_greeting(bed, "n1a")
        bed.write_mesh()
        bed.make_ca()
        bed.start_servers()
        node_agents: dict[int, ZdsServer] = {}
        stack.callback(lambda: [one.close() for one in node_agents.values()])
        for node, agent in bed.agents.items():
            node_agents[node] = ZdsServer(zds_socket(bed, node))
            agent.launch("--pods-from", f"zds:{zds_socket(bed, node)}")
            node_agents[node].meet()
        for pod in bed.captured:
            hand_over(node_agents[pod.node], pod)
            redirect(bed, pod)
        for agent in bed.agents.values():
            agent.wait_ready()
        yield bed, node_agents


def hand_over(node_agent: ZdsServer, pod: Pod) -> None:
    namespace, name = pod.key.split("/")
    node_agent.add(pod.key, name, namespace, pod.service_account, NETNS_DIR / pod.netns)


@pytest.fixture
def bed(handed: Handed) -> Testbed:
    return handed[0]


def test_pods_of_two_nodes_talk_over_hbone_alone(bed: Testbed, family: Family) -> None:
    with Sniffer(bed.node_netns(1), "trunk", (MARKER,)) as sniffer:
        passes(bed, bed["n1a"], bed["n2a"].address(family))
        passes(bed, bed["n1a"], bed["n2a"].vip(family), 80)
    assert sniffer.seen.tcp_service_ports() == {15008}
    assert sniffer.seen.plaintext == []


def test_pods_of_one_node_talk_and_addresses_stay_true(bed: Testbed, family: Family) -> None:
    passes(bed, bed["n1a"], bed["n1b"].address(family))
    for client, target in ((bed["n1a"], bed["n2a"]), (bed["n1a"], bed["n1b"])):
        seen = whoami(bed, client, target.address(family))
        assert seen["peer"] == client.address(family)
        assert seen["local"] == target.address(family)


def test_plaintext_goes_out_and_comes_in(bed: Testbed, family: Family) -> None:
    passes(bed, bed["n1a"], bed["n2x"].address(family))
    seen = whoami(bed, bed["n2x"], bed["n1a"].address(family))
    assert seen["peer"] == bed["n2x"].address(family)


def test_policy_is_ours_to_decide(bed: Testbed, family: Family) -> None:
    address = bed["n2a"].address(family)
    refused(bed, bed["n1a"], address, server.GREET)
    with bed.connect(bed["n2b"], address, server.GREET) as sock:
        assert sock.recv(100).startswith(b"220 ")


@pytest.mark.parametrize("tcp", [False, True], ids=["udp", "tcp"])
def test_names_of_the_mesh_are_answered_through_the_redirect(bed: Testbed, tcp: bool) -> None:
    target = bed["n2a"]
    for resolver in (bed["n2x"].ipv4, bed["n2x"].ipv6):
        answer = ask(bed["n1a"], resolver, f"{target.hostname}.", tcp=tcp)
        assert records(answer) == {target.vip(4)}


def test_status_says_whose_pods_they_are(bed: Testbed) -> None:
    said = bed.agents[1].cli("status").stdout
    assert "captured by the node agent" in said
    why = bed.agents[1].cli("explain", bed["n1a"].key, f"{bed['n2a'].ipv4}:80").stdout
    assert "by the rules of Istio's node agent" in why
    refused = bed.agents[1].cli("detach", "--pod", bed["n1a"].key, check=False)
    assert "node agent" in refused.stderr
    assert "node agent" in bed.agents[1].cli("reload", check=False).stderr
    assert bed.agents[1].pod_state(bed["n1a"].key) == "attached"


def test_metrics_and_the_configuration_dump_know_them(bed: Testbed) -> None:
    passes(bed, bed["n1a"], bed["n2a"].ipv4)
    web = Web(bed)
    status, _, metrics = web(1, 15020, "/metrics")
    assert status == 200
    assert 'istio_tcp_connections_opened_total{reporter="source"' in metrics
    status, _, dump = web(1, 15000, "/config_dump")
    assert status == 200
    assert bed["n1a"].name in dump


def test_a_node_agent_that_comes_back_finds_its_pods_served(handed: Handed) -> None:
    bed, node_agents = handed
    with bed.connect(bed["n1a"], bed["n2a"].ipv4, server.ECHO) as sock:
        echo(sock)
        node_agents[1].close()
        eventually("it is missed", lambda: not bed.agents[1].ask(StatusRequest()).ready)
        node_agents[1] = ZdsServer(zds_socket(bed, 1))
        node_agents[1].meet(snapshot=False)
        for name in ("n1a", "n1b"):
            hand_over(node_agents[1], bed[name])
        node_agents[1].snapshot()
        echo(sock)
    eventually("it is ready", lambda: bed.agents[1].ask(StatusRequest()).ready)


def test_what_a_snapshot_leaves_out_is_gone(handed: Handed) -> None:
    bed, node_agents = handed
    node_agents[1].close()
    eventually("it is missed", lambda: not bed.agents[1].ask(StatusRequest()).ready)
    assert bed.agents[1].pod_state(bed["n1b"].key) == "attached"
    node_agents[1] = ZdsServer(zds_socket(bed, 1))
    node_agents[1].meet(snapshot=False)
    hand_over(node_agents[1], bed["n1a"])
    node_agents[1].snapshot()
    assert bed.agents[1].pod_state(bed["n1b"].key) == "unknown"
    hand_over(node_agents[1], bed["n1b"])
    passes(bed, bed["n1b"], bed["n2a"].ipv4)


def test_a_deleted_pod_is_served_no_more(handed: Handed) -> None:
    bed, node_agents = handed
    pod = bed["n2b"]
    node_agents[2].delete(pod.key)
    assert bed.agents[2].pod_state(pod.key) == "unknown"
    with bed.make_socket(pod, 4) as sock, pytest.raises(ConnectionRefusedError):
        sock.connect((pod.ipv4, 15008))
    hand_over(node_agents[2], pod)
    passes(bed, bed["n1a"], pod.ipv4)
