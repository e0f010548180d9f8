"""Who may not: policies, marks that a pod sets itself, and probes that must get through."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from tests.netns.talk import MARKER, echo, ends, passes, refused
from tests.progs import server
from tests.progs.pod import Family
from tests.progs.sniffer import Sniffer
from tests.testbed import Testbed

pytestmark = [pytest.mark.root, pytest.mark.netns]

# "Only mutual TLS": how Istio's control plane spells STRICT for ztunnel.
STRICT: list[Any] = [[[{"notPrincipals": [{"Presence": []}]}]]]


def test_a_policy_that_arrives_cuts_live_connections(bed: Testbed, family: Family) -> None:
    client, target = bed["n1a"], bed["n2a"].address(family)
    with (
        bed.connect(client, target, server.ECHO) as denied,
        bed.connect(client, target, server.GREET) as allowed,
    ):
        echo(denied)
        rules = [[[{"destinationPorts": [server.ECHO]}]]]
        with bed.policy(action="Deny", rules=rules):
            assert ends(denied, 2.0)
            refused(bed, client, target)
            allowed.recv(100)
            echo(allowed)
        echo(allowed)
    passes(bed, client, target)


def test_a_policy_tells_accounts_apart(bed: Testbed, family: Family) -> None:
    target = bed["n1b"].address(family)
    principal = bed["n2b"].identity.removeprefix("spiffe://")
    with bed.policy(action="Deny", rules=[[[{"principals": [{"Exact": principal}]}]]]):
        refused(bed, bed["n2b"], target)
        passes(bed, bed["n2a"], target)


def test_strict_refuses_plaintext_and_takes_the_mesh(bed: Testbed, family: Family) -> None:
    target = bed["n1a"].address(family)
    with bed.policy(action="Deny", rules=STRICT):
        refused(bed, bed["n1x"], target)
        refused(bed, bed["n2x"], target)
        passes(bed, bed["n2a"], target)
        passes(bed, bed["n1b"], target)


def test_a_probe_of_the_node_passes_where_others_are_refused(bed: Testbed, family: Family) -> None:
    address = bed["n1a"].address(family)
    with bed.policy(action="Deny", rules=STRICT):
        refused(bed, 1, address)
        _probe(bed, address)
    with bed.agents[1].dead():
        refused(bed, 1, address)
        _probe(bed, address)


def _probe(bed: Testbed, address: str) -> None:
    """A connection from the node by a process of the cgroup that plays kubelet's."""
    client = f"{sys.executable} -m tests.progs.client echo {address} {server.ECHO}"
    join = f"echo $$ > {bed.cgroup}/cgroup.procs && exec {client}"
    bed.run(bed.node_netns(1), ["sh", "-c", join])


@pytest.mark.parametrize("mark", [0x1, 0x111, 0x112, 0x539, 0x10111, 0xFFFFFFFF])
def test_a_pod_that_sets_marks_is_captured_all_the_same(
    bed: Testbed, family: Family, mark: int
) -> None:
    client = [sys.executable, "-m", "tests.progs.client"]
    capability = "-all,+net_raw"
    argv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    argv += [f"--inh-caps={capability}", f"--ambient-caps={capability}"]
    argv += [f"--bounding-set={capability}", *client, "echo"]
    argv += [bed["n2a"].address(family), str(server.ECHO), "--mark", hex(mark)]
    with Sniffer(bed.node_netns(1), "trunk", (MARKER,)) as sniffer:
        bed.run(bed["n1a"].netns, argv)
    assert sniffer.seen.tcp_service_ports() <= {15008}
    assert sniffer.seen.plaintext == []
