"""A client that follows a control plane of ours."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.runtime.mesh import LiveMesh
from meshbpf.agent.runtime.xds_source import XdsSource
from meshbpf.agent.wire import xds
from tests.xds.istiod import Istiod, serving

NODE = xds.node({"POD_NAME": "agent-1", "POD_NAMESPACE": "istio-system"}, "node1", "Kubernetes")


async def eventually(holds: Callable[[], object], seconds: float = 20) -> None:
    """Wait until it is true; TooSlowError when it never is."""
    with trio.fail_after(seconds):
        while not holds():  # noqa: ASYNC110 (no event tells of what a server saw)
            await trio.sleep(0.005)


@dataclass(slots=True, eq=False)
class Client:
    """An xDS source and the mesh that it fills."""

    source: XdsSource
    mesh: LiveMesh = field(default_factory=lambda: LiveMesh(trio.Lock()))
    started: trio.Event = field(default_factory=trio.Event)

    @property
    def snapshot(self) -> Snapshot:
        return self.mesh.snapshot

    async def follow(self, task_status: trio.TaskStatus[None]) -> None:
        await self.source.watch(self.mesh, task_status=task_status)

    async def run(self, nursery: trio.Nursery) -> None:
        await nursery.start(self.follow)
        self.started.set()

    async def until(self, holds: Callable[[Snapshot], object], seconds: float = 20) -> Snapshot:
        """The first snapshot that `holds` is true of."""
        await eventually(lambda: holds(self.snapshot), seconds)
        return self.snapshot


@asynccontextmanager
async def following(istiod: Istiod) -> AsyncIterator[Client]:
    """A client under way; it need not have begun."""
    client = Client(XdsSource(istiod.plane(), NODE, rng=random.Random(1)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run, nursery)
        yield client
        nursery.cancel_scope.cancel()


@pytest.fixture
async def istiod(tmp_path: Path) -> AsyncIterator[Istiod]:
    async with serving(tmp_path) as server:
        yield server
