"""Which destinations must enter the agent."""

from __future__ import annotations

import pytest

from meshbpf.agent.core.address import unpacked
from meshbpf.agent.core.steering import mesh_prefixes
from meshbpf.agent.core.workload import NetworkMode
from tests.unit.core.builders import gateway, mesh, plain, pod, service

MESH = mesh(
    pod("a", "10.0.0.1", "fd00::1"),
    plain("outsider", "10.0.0.2"),
    plain("guarded", "10.0.0.3", waypoint=gateway("/10.0.0.1")),
    pod("host", "10.0.0.4", network_mode=NetworkMode.HOST_NETWORK),
    pod("far", "10.0.0.5", network="far"),
    service("web", "10.9.0.1", "fd09::1", "10.8.0.0/16", "far/10.9.0.9"),
)


def texts(network: str | None = None) -> set[str]:
    return {str(unpacked(prefix)) for prefix in mesh_prefixes(MESH, network)}


@pytest.mark.compat
def test_members_guarded_workloads_and_virtual_addresses_enter() -> None:
    assert texts("") == {
        "10.0.0.1/32",
        "fd00::1/128",
        "10.0.0.3/32",
        "10.9.0.1/32",
        "fd09::1/128",
        "10.8.0.0/16",
    }


def test_without_a_network_those_of_all_enter() -> None:
    assert texts() - texts("") == {"10.0.0.5/32", "10.9.0.9/32"}
    assert texts("far") == {"10.0.0.5/32", "10.9.0.9/32"}


@pytest.mark.compat
def test_outsiders_and_host_network_pods_stay_outside() -> None:
    assert not texts() & {"10.0.0.2/32", "10.0.0.4/32"}
