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


# Whose facts depend on the relay's innermost loop; the others have it as it was built.
IN_BOTH_FORMS = frozenset({"test_both_forms", "test_reactor", "test_relay", "test_tunnels"})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that need a forwarder run with each form of the relay's loop where it matters."""
    if "form" in metafunc.fixturenames:
        both = metafunc.module.__name__.rpartition(".")[2] in IN_BOTH_FORMS
        metafunc.parametrize("form", ["c", "python"] if both else ["built"], indirect=True)


@pytest.fixture
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of its two forms the relay's innermost loop has."""
    if request.param == "python":
        monkeypatch.setenv("MESHBPF_PURE_PYTHON", "1")
    elif request.param == "c" and not native.available():
        pytest.skip("the relay's loop in C was not built: no gcc, or no python3-dev")
    name: str = request.param
    return name


@pytest.fixture
async def rig(form: str, spaces: tuple[Netns, Netns]) -> AsyncIterator[Rig]:
    """Two running forwarders."""
    del form  # set before the first reactor is made
    async with forwarding(spaces) as running:
        yield running
