"""Two real agents in network namespaces, fed and certified by a control plane of ours."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from meshbpf.agent.api import CertsRequest, StatusRequest
from tests.netns import talk
from tests.progs.program import BedError, eventually
from tests.progs.server import ECHO
from tests.testbed import SUITE_TAG
from tests.xds import records, serve
from tests.xds.controlled import ADDRESS, ControlledBed

pytestmark = pytest.mark.xds


@pytest.fixture(scope="module")
def bed() -> Iterator[ControlledBed]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    with ControlledBed(f"{SUITE_TAG}xds") as bed:
        bed.prepare()
        bed.start_agents()
        bed.start_servers()
        bed.attach_all()
        yield bed


def test_pods_talk_over_hbone_with_certificates_that_the_control_plane_signed(
    bed: ControlledBed,
) -> None:
    client, server = bed["n1a"], bed["n2a"]
    talk.passes(bed, client, server.ipv4)
    talk.passes(bed, client, server.ipv6)
    state = bed.agents[1].ask(StatusRequest()).state
    assert (state.kind, state.origin, state.error) == ("xds", ADDRESS, None)
    assert state.workloads == len(bed.pods)
    certs = bed.agents[2].ask(CertsRequest()).certs
    # Pods that are captured here, and no other's identity.
    assert {cert.identity for cert in certs} == {
        pod.identity for pod in bed.captured if pod.node == 2
    }
    assert {cert.state for cert in certs} == {"valid"}
    with bed.connect(client, server.ipv4, ECHO) as sock:
        talk.echo(sock)
        (carried,) = bed.agents[2].carried(client.ipv4)
        assert carried.peer_identity == client.identity


def test_a_policy_that_the_control_plane_pushes_cuts_a_live_connection(
    bed: ControlledBed,
) -> None:
    client, server = bed["n1a"], bed["n2a"]
    name = f"{server.namespace}/no"
    with bed.connect(client, server.ipv4, ECHO) as sock:
        talk.echo(sock)
        deny = records.policy(
            "no", client.identity.removeprefix("spiffe://"), namespace=server.namespace, action=1
        )
        serve.write(bed.control, "authorization", name, deny)
        eventually("the connection ends", lambda: _ended(sock), 5.0)
    talk.refused(bed, client, server.ipv4)
    serve.path_of(bed.control, "authorization", name).unlink()
    eventually("the pod is let in again", lambda: _let_in(bed), 5.0)


def test_connections_live_on_while_the_control_plane_is_restarted(bed: ControlledBed) -> None:
    client, server = bed["n1a"], bed["n2a"]
    with bed.connect(client, server.ipv4, ECHO) as sock:
        talk.echo(sock)
        bed.servers["istiod"].end(signal.SIGKILL)
        eventually(
            "the agent says that istiod is away",
            lambda: bed.agents[1].ask(StatusRequest()).state.error,
            10.0,
        )
        talk.echo(sock)
        talk.passes(bed, client, server.ipv4)
        assert bed.agents[1].ask(StatusRequest()).ready
        bed.serve_control()
        eventually(
            "the agent is with istiod again",
            lambda: bed.agents[1].ask(StatusRequest()).state.error is None,
            30.0,
        )
        talk.echo(sock)


def _ended(sock: object) -> bool:
    try:
        talk.echo(sock)  # type: ignore[arg-type]
    except (OSError, BedError):
        return True
    return False


def _let_in(bed: ControlledBed) -> bool:
    try:
        talk.passes(bed, bed["n1a"], bed["n2a"].ipv4)
    except (OSError, BedError, AssertionError):
        return False
    return True
