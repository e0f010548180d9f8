"""Two agents under a real istiod on a real kube-apiserver."""

from __future__ import annotations

import socket

import pytest

from meshbpf.agent.api import CertsRequest, PoliciesRequest, StatusRequest, WorkloadsRequest
from tests.cluster.bed import ADDRESS, ClusterBed
from tests.cluster.control_plane import (
    missing,
)
from tests.netns import talk
from tests.progs.program import BedError, eventually
from tests.progs.server import ECHO

pytestmark = [pytest.mark.peer, pytest.mark.skipif(bool(missing()), reason=missing() or "-")]


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
