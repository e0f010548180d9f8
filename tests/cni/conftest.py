"""One plugin and one testbed for the bare calls; its agents have objects and no attached pod."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshbpf.agent.api import DetachRequest, PodsRequest
from tests.cni.plugin import Plugin, build
from tests.testbed import SUITE_TAG, Testbed


@pytest.fixture(scope="session")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed: make setup")
    return build(tmp_path_factory.mktemp("cni"))


@pytest.fixture(scope="session")
def nodes() -> Iterator[Testbed]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    with Testbed(f"{SUITE_TAG}cni", manifests=True) as bed:
        bed.start_agents()
        bed.start_servers()
        yield bed


@pytest.fixture
def bed(nodes: Testbed) -> Iterator[Testbed]:
    yield nodes
    for agent in nodes.agents.values():
        if not agent.running:
            agent.start(*agent.options)
        for pod in agent.ask(PodsRequest()).pods:
            agent.ask(DetachRequest(pod=pod.pod))


@pytest.fixture
def plugin(binary: Path, bed: Testbed) -> Plugin:
    """As node 1's runtime calls it."""
    return Plugin(binary, bed.agents[1].state_dir / "cni.sock")
