"""Fixtures of the forwarder's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from meshbpf.agent.datapath.netns import Netns
from meshbpf.agent.runtime import native
from tests.unit.forwarder.rig import Rig, forwarding, namespaces


@pytest.fixture(scope="session")
def spaces() -> Iterator[tuple[Netns, Netns]]:
    """Two joined network namespaces, for all tests of the run."""
    with namespaces() as both:
        yield both


@pytest.fixture(params=["c", "python"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of its two forms the relay's innermost loop has."""
    if request.param == "python":
        monkeypatch.setenv("MESHBPF_PURE_PYTHON", "1")
    elif not native.available():
        pytest.skip("the relay's loop in C was not built: no gcc, or no python3-dev")
    name: str = request.param
    return name


@pytest.fixture
async def rig(form: str, spaces: tuple[Netns, Netns]) -> AsyncIterator[Rig]:
    """Two running forwarders."""
    del form  # set before the first reactor is made
    async with forwarding(spaces) as running:
        yield running
