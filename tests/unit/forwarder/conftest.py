"""Fixtures of the forwarder's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from meshbpf.agent.datapath.netns import Netns
from tests.unit.forwarder.rig import Rig, forwarding, namespaces


@pytest.fixture(scope="session")
def spaces() -> Iterator[tuple[Netns, Netns]]:
    """Two joined network namespaces, for all tests of the run."""
    with namespaces() as both:
        yield both


@pytest.fixture
async def rig(spaces: tuple[Netns, Netns]) -> AsyncIterator[Rig]:
    """Two running forwarders."""
    async with forwarding(spaces) as running:
        yield running
