"""The namespaces, one for the module's tests, and a Steering of its own for each test."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from meshbpf.agent.datapath.netns import Netns
from meshbpf.agent.datapath.steering import Capture, PodSteering, Steering
from tests.bpf import lab
from tests.bpf.lab import TinyAgent

_numbers = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.root)
            if os.geteuid() != 0:
                item.add_marker(pytest.mark.skip(reason="needs root"))


@pytest.fixture(scope="session")
def cache_dir(pytestconfig: pytest.Config) -> Path:
    """Bytecode outlives the run: compiling takes some seconds, and an edit changes its key."""
    assert pytestconfig.cache is not None
    path = pytestconfig.cache.mkdir("meshbpf-bpf")
    path.chmod(0o700)
    return path


@pytest.fixture(scope="session")
def _namespaces() -> Iterator[None]:
    names = (lab.HOST, lab.POD, lab.PEER)
    for name in names:
        lab.remove(name)
    try:
        lab.add_host()
        lab.add_pod(lab.POD, 1)
        lab.add_pod(lab.PEER, 2)
        yield
    finally:
        for name in names:
            lab.remove(name)


@pytest.fixture(scope="module")
def in_host(_namespaces: None) -> Iterator[Netns]:
    """The test's thread is in the host namespace, until the module's end."""
    with lab.opened(lab.HOST) as host, host.entered():
        yield host


@pytest.fixture(scope="module")
def pod(in_host: Netns) -> Iterator[Netns]:
    with lab.opened(lab.POD) as netns:
        yield netns


@pytest.fixture(scope="module")
def peer(in_host: Netns) -> Iterator[Netns]:
    with lab.opened(lab.PEER) as netns, lab.app(netns, "peer"):
        yield netns


@pytest.fixture(scope="module", params=["auto", "tc", "clsact"])
def capture(request: pytest.FixtureRequest) -> str:
    """Connect hooks over TC; TC alone; TC alone by clsact filters, as before 6.6."""
    mode: str = request.param
    return mode


Open = Callable[..., Steering]


@contextlib.contextmanager
def _opener(cache_dir: Path) -> Iterator[Open]:
    opened: dict[str, Steering] = {}

    def do_open(agent_id: str = "", mode: str = "auto", **more: object) -> Steering:
        agent_id = agent_id or f"st-test-{os.getpid()}-{next(_numbers)}"
        steering = Steering.open(
            agent_id=agent_id,
            cache_dir=cache_dir,
            capture=Capture.AUTO if mode == "auto" else Capture.TC,
            use_tcx=False if mode == "clsact" else None,
            **more,  # type: ignore[arg-type]
        )
        opened[agent_id] = steering
        return steering

    try:
        yield do_open
    finally:
        for steering in opened.values():
            with contextlib.suppress(ValueError):  # closed, by a test that has seen to the rest
                steering.destroy()


@pytest.fixture
def open_steering(in_host: Netns, cache_dir: Path) -> Iterator[Open]:
    """Opens a Steering; at the end each agent id that was opened is destroyed."""
    with _opener(cache_dir) as opener:
        yield opener


@pytest.fixture
def steering(open_steering: Open, capture: str) -> Steering:
    """One that is the test's own, with the mesh in its map."""
    made = open_steering(mode=capture)
    made.set_mesh(lab.MESH)
    return made


@contextlib.contextmanager
def _agent(steering: Steering, pod: Netns) -> Iterator[TinyAgent]:
    tiny = TinyAgent(steering, pod)
    tiny.start()
    try:
        with lab.app(pod, "pod"):
            steering.attach(PodSteering("ns/pod", pod), tiny.listeners)
            yield tiny
    finally:
        tiny.stop()


@pytest.fixture
def own_agent(steering: Steering, pod: Netns) -> Iterator[TinyAgent]:
    """The pod is attached, an app runs in it, and a tiny agent of the test's own serves it."""
    with _agent(steering, pod) as tiny:
        yield tiny


@pytest.fixture(scope="module")
def _shared_agent(cache_dir: Path, capture: str, pod: Netns) -> Iterator[TinyAgent]:
    with _opener(cache_dir) as opener, _agent(opener(mode=capture), pod) as tiny:
        yield tiny


@pytest.fixture
def agent(_shared_agent: TinyAgent) -> Iterator[TinyAgent]:
    """As `own_agent`, but the module's: brought back to its settings after the test."""
    _shared_agent.steering.set_mesh(lab.MESH)
    yield _shared_agent
    _shared_agent.wake()
    wanted = PodSteering("ns/pod", _shared_agent.netns)
    _shared_agent.steering.attach(wanted, _shared_agent.listeners)
