"""Two agents under a real istiod on a real kube-apiserver."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from meshbpf.agent.api import CertsRequest, PoliciesRequest, StatusRequest, WorkloadsRequest
from tests.cluster.control_plane import (
    AGENT_NAMESPACE,
    ISTIOD_PORT,
    NAME,
    ControlPlane,
    agent_objects,
    agent_pod,
    missing,
)
from tests.netns import talk
from tests.progs.kube_objects import mesh_objects
from tests.progs.pod import node_address
from tests.progs.program import BedError, eventually
from tests.progs.server import ECHO
from tests.testbed import SUITE_TAG, Testbed

pytestmark = [pytest.mark.peer, pytest.mark.skipif(bool(missing()), reason=missing() or "-")]
ADDRESS = f"https://{node_address(1, 4)}:{ISTIOD_PORT}"
REDIRECTED = {"ambient.istio.io/redirection": "enabled"}


class ClusterBed(Testbed):
    """A testbed whose mesh is a cluster's."""

    def __init__(self, tag: str) -> None:
        super().__init__(tag)
        self.cluster = ControlPlane(self)
        root = ("--xds-root", str(self.cluster.root_file), "--ca-root", str(self.cluster.root_file))
        self.state_options = ("--xds", ADDRESS, "--xds-name", NAME, *root)
        self.ca_options = ("--ca", ADDRESS, "--ca-name", NAME)

    def environment(self, node: int) -> tuple[str, ...]:
        names = (f"POD_NAME={agent_pod(node)}", f"POD_NAMESPACE={AGENT_NAMESPACE}")
        return ("env", *names, f"INSTANCE_IP={node_address(node, 4)}")

    def create_objects(self) -> None:
        """The testbed's pods and services, as kubectl, CNI and kubelet would have made them."""
        objects: list[dict[str, Any]] = []
        for one in mesh_objects(self.pods.values()):
            if one["kind"] == "Pod":
                if "istio.io/dataplane-mode" not in one["metadata"]["labels"]:
                    one["metadata"]["annotations"] = REDIRECTED
                one["status"]["conditions"] = [{"type": "Ready", "status": "True"}]
            if one["kind"] == "Service":
                # The test cluster has one family; pods have two all the same.
                four = one["spec"]["clusterIPs"][0]
                one["spec"] |= {"clusterIP": four, "clusterIPs": [four]}
                one["spec"].pop("ipFamilies", None)
                one["spec"].pop("ipFamilyPolicy", None)
            objects.append(one)
        nodes_first = sorted(objects, key=lambda one: one["kind"] in ("Pod", "Service"))
        self.cluster.apply(*nodes_first)
        self.cluster.apply(*agent_objects())

    def launch_agents(self) -> None:
        for node, agent in self.agents.items():
            agent.launch("--token-file", str(self.cluster.token(node)))
        for agent in self.agents.values():
            agent.wait_ready(120.0)


@pytest.fixture(scope="module")
def bed() -> Iterator[ClusterBed]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    with ClusterBed(f"{SUITE_TAG}cl") as bed:
        bed.cluster.start_kubernetes()
        bed.create_objects()
        bed.cluster.new_root()
        bed.cluster.start_istiod()
        bed.launch_agents()
        bed.start_servers()
        bed.attach_all()
        yield bed


def test_workloads_and_services_created_with_kubectl_arrive(bed: ClusterBed) -> None:
    state = bed.agents[1].ask(StatusRequest()).state
    assert (state.kind, state.origin, state.error) == ("xds", ADDRESS, None)
    workloads = {one.name: one for one in bed.agents[1].ask(WorkloadsRequest()).workloads}
    for pod in bed.pods.values():
        assert pod.ipv4 in workloads[pod.name].addresses
        assert workloads[pod.name].protocol == ("HBONE" if pod.captured else "TCP")
    assert state.services >= len(bed.pods)


def test_pods_talk_over_hbone_with_certificates_that_istiod_signed(bed: ClusterBed) -> None:
    client, server = bed["n1a"], bed["n2a"]
    talk.passes(bed, client, server.ipv4)
    talk.passes(bed, client, server.ipv6)
    talk.passes(bed, client, server.vip(4))
    with bed.connect(client, server.ipv4, ECHO) as sock:
        talk.echo(sock)
        (carried,) = bed.agents[2].carried(client.ipv4)
        assert (carried.protocol, carried.peer_identity) == ("HBONE", client.identity)
    certs = bed.agents[2].ask(CertsRequest()).certs
    assert {cert.identity for cert in certs} >= {
        pod.identity for pod in bed.captured if pod.node == 2
    }
    assert {cert.state for cert in certs} == {"valid"}


def test_an_authorization_policy_applied_with_kubectl_cuts_a_live_connection(
    bed: ClusterBed,
) -> None:
    client, server = bed["n1a"], bed["n2a"]
    policy = {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "no-n1a", "namespace": server.namespace},
        "spec": {
            "selector": {"matchLabels": {"app": server.name}},
            "action": "DENY",
            "rules": [
                {"from": [{"source": {"principals": [client.identity.removeprefix("spiffe://")]}}]}
            ],
        },
    }
    with bed.connect(client, server.ipv4, ECHO) as sock:
        talk.echo(sock)
        bed.cluster.apply(policy)
        eventually("the connection ends", lambda: not _lives(sock), 20.0)
    policies = bed.agents[2].ask(PoliciesRequest()).policies
    assert [one.name for one in policies] == ["no-n1a"]
    talk.refused(bed, client, server.ipv4)
    bed.cluster.kubectl("-n", server.namespace, "delete", "authorizationpolicy", "no-n1a")
    eventually("the pod is let in again", lambda: _lets_in(bed), 20.0)


def test_istiod_restarted_and_its_root_rotated_without_a_dropped_connection(
    bed: ClusterBed,
) -> None:
    client, server = bed["n1a"], bed["n2a"]
    before = {cert.identity: cert.serial for cert in bed.agents[2].ask(CertsRequest()).certs}
    with bed.connect(client, server.ipv4, ECHO) as sock:
        talk.echo(sock)
        bed.cluster.stop_istiod()
        talk.echo(sock)
        talk.passes(bed, client, server.ipv4)
        bed.cluster.new_root()
        bed.cluster.start_istiod()
        eventually(
            "both nodes have certificates of the new root", lambda: _renewed(bed, before), 90.0
        )
        talk.echo(sock)
        talk.passes(bed, client, server.ipv4)
        for agent in bed.agents.values():
            assert len(agent.ask(CertsRequest()).roots) == 2
            assert agent.ask(StatusRequest()).ready
        talk.echo(sock)


def _renewed(bed: ClusterBed, before: dict[str, str]) -> bool:
    answers = [agent.ask(CertsRequest()) for agent in bed.agents.values()]
    return all(
        len(answer.roots) == 2
        and all(
            cert.state == "valid" and cert.serial != before.get(cert.identity)
            for cert in answer.certs
        )
        for answer in answers
    )


def _lives(sock: socket.socket) -> bool:
    try:
        talk.echo(sock)
    except (OSError, BedError):
        return False
    return True


def _lets_in(bed: ClusterBed) -> bool:
    try:
        talk.passes(bed, bed["n1a"], bed["n2a"].ipv4)
    except (OSError, BedError, AssertionError):
        return False
    return True
