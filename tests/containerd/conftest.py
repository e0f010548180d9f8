"""One pair of nodes for the whole suite; each test finds and leaves them without pods."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containerd import bed as bed_module
from tests.containerd.bed import CriBed
from tests.containerd.node import Made
from tests.progs.program import BedError
from tests.testbed import Testbed

ACCOUNT_WAIT_S = 2
TAG = os.environ.get("MESHBPF_CONTAINERD_TAG", "cri")


@pytest.fixture(scope="session")
def nodes() -> Iterator[CriBed]:
    if reason := bed_module.missing():
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        bed = CriBed(TAG)
        try:
            stack.enter_context(bed)
        except (BedError, subprocess.CalledProcessError) as error:
            # A container may lack what a runtime needs (overlays, controllers).
            if Path("/run/systemd/container").exists():
                pytest.skip(f"no container runtime starts inside this container: {error}")
            raise
        if reason := bed.cannot_run():
            pytest.skip(reason)
        bed.start_agents("--account-wait", f"{ACCOUNT_WAIT_S}s")
        yield bed
        # What a suite leaves is looked for here, where all of it ought to be gone.
        bed.close()
        for runtime in bed.runtimes.values():
            assert runtime.left() == []


@pytest.fixture(scope="session")
def pods(nodes: CriBed) -> dict[str, Made]:
    """Pods that no test harms: a and c on node 1, b on node 2."""
    return {pod.name: pod for pod in nodes.run_pods(("a", 1), ("b", 2), ("c", 1))}


@pytest.fixture
def bed(nodes: CriBed, pods: dict[str, Made]) -> Iterator[CriBed]:
    yield nodes
    for agent in nodes.agents.values():
        if not agent.running:
            agent.start(*agent.options)
    nodes.tidy(keep=tuple(pods.values()))


@pytest.fixture
def a(pods: dict[str, Made]) -> Made:
    return pods["a"]


@pytest.fixture
def b(pods: dict[str, Made]) -> Made:
    return pods["b"]


@pytest.fixture
def c(pods: dict[str, Made]) -> Made:
    return pods["c"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Put the ends of the agents' logs under a failure."""
    report: pytest.TestReport = yield  # type: ignore[assignment]
    if report.failed:
        for bed in Testbed.live:
            report.sections.append((f"agents of testbed {bed.tag}", bed.report()))
    return report  # type: ignore[return-value]
