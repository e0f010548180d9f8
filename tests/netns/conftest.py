"""Testbeds for the tests in network namespaces, built as few times as can be.

`bed` is one testbed a capture mode with agents running, pods attached and
servers up; its tests leave it as they found it. pytest runs all tests of one
mode, then all of the other. Tests that need agents with options of their own
build a testbed under a tag of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.progs.server import EXEMPT
from tests.testbed import SUITE_TAG, Testbed


@pytest.fixture(scope="session", autouse=True)
def _root() -> None:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")


@pytest.fixture(scope="session")
def plain() -> Iterator[Testbed]:
    """A testbed without agents: what the servers and clients do with no mesh at all."""
    with Testbed(f"{SUITE_TAG}plain") as bed:
        bed.start_servers()
        yield bed


@pytest.fixture(scope="session", params=["auto", "tc"])
def bed(request: pytest.FixtureRequest) -> Iterator[Testbed]:
    with Testbed(SUITE_TAG) as bed:
        bed.cgroup.mkdir()
        bed.start_agents(
            *("--capture", request.param),
            *("--exempt-port", str(EXEMPT)),
            *("--probe-cgroup", str(bed.cgroup)),
        )
        bed.start_servers()
        bed.attach_all()
        yield bed


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Put the ends of the agents' logs under a failure."""
    report: pytest.TestReport = yield  # type: ignore[assignment]
    if report.failed:
        for bed in Testbed.live:
            report.sections.append((f"agents of testbed {bed.tag}", bed.report()))
    return report  # type: ignore[return-value]
