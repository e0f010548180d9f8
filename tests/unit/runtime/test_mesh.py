"""The one writer of mesh state: what reaches the kernel and when, what a failure leaves."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from ipaddress import ip_address

import pytest
import trio

from meshbpf.agent.core.address import PackedPrefix, packed_host
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.state import MeshDelta, MeshState
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.runtime.mesh import LiveMesh
from tests.unit.core.builders import pod, service

A, B = pod("a", "10.0.0.1"), pod("b", "10.0.0.2")


def host(text: str) -> PackedPrefix:
    return packed_host(ip_address(text))


class Kernel:
    """Notes what it is told; full when a test says so."""

    def __init__(self) -> None:
        self.held: set[PackedPrefix] = {host("10.9.9.9")}
        self.told: list[str] = []
        self.full = False

    def replace_mesh(self, prefixes: Iterable[PackedPrefix]) -> None:
        self.told.append("replace")
        self.held = set(prefixes)

    def change_mesh(
        self, added: Collection[PackedPrefix], removed: Collection[PackedPrefix]
    ) -> None:
        if self.full:
            raise MeshbpfError("mesh-too-large", "the map is full")
        self.told.append(f"+{len(added)}-{len(removed)}")
        self.held = self.held.union(added).difference(removed)


async def followed() -> tuple[LiveMesh, Kernel]:
    mesh, kernel = LiveMesh(trio.Lock()), Kernel()
    mesh.steer_with(kernel)
    await mesh.apply(MeshState(workloads=(A,)))
    return mesh, kernel


async def test_the_first_state_replaces_what_an_earlier_agent_left() -> None:
    mesh, kernel = await followed()
    await mesh.apply_delta(MeshDelta(workloads=(B,), removed_workloads=(A.uid,)))
    assert kernel.told == ["replace", "+1-1"]
    assert kernel.held == {host("10.0.0.2")}
    assert mesh.snapshot.version == 2


async def test_a_whole_state_reaches_the_kernel_as_what_it_changes() -> None:
    mesh, kernel = await followed()
    await mesh.apply(MeshState(workloads=(A, B)))
    assert kernel.told == ["replace", "+1-0"]
    assert mesh.snapshot.workload(A.uid) is A


async def test_an_address_goes_with_the_last_record_that_has_it() -> None:
    mesh, kernel = await followed()
    twin = service("a.local", "10.0.0.1")
    await mesh.apply_delta(MeshDelta(services=(twin,)))
    await mesh.apply_delta(MeshDelta(removed_workloads=(A.uid,)))
    assert host("10.0.0.1") in kernel.held
    await mesh.apply_delta(MeshDelta(removed_services=(twin.key,)))
    assert not kernel.held


async def test_when_the_kernel_refuses_nothing_has_changed() -> None:
    mesh, kernel = await followed()
    heard: list[Snapshot] = []
    mesh.on_change(heard.append)
    before, kernel.full = mesh.snapshot, True
    with pytest.raises(MeshbpfError, match="full"):
        await mesh.apply_delta(MeshDelta(workloads=(B,)))
    assert mesh.snapshot is before
    assert not heard
    kernel.full = False
    await mesh.apply_delta(MeshDelta(workloads=(B,)))
    assert kernel.held == {host("10.0.0.1"), host("10.0.0.2")}
    assert heard == [mesh.snapshot]


async def test_the_kernel_knows_a_destination_before_anybody_routes_to_it() -> None:
    mesh, kernel = await followed()
    seen: list[bool] = []
    mesh.on_change(lambda _snapshot: seen.append(host("10.0.0.2") in kernel.held))
    await mesh.apply_delta(MeshDelta(workloads=(B,)))
    assert seen == [True]
