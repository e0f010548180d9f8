"""One testbed for all tests of the waypoint: its pods, agents and the process stand throughout."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.testbed import SUITE_TAG, Testbed
from tests.waypoint.bed import WaypointBed


@pytest.fixture(scope="session", autouse=True)
def _root() -> None:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")


@pytest.fixture(scope="session")
def bed() -> Iterator[WaypointBed]:
    with WaypointBed(f"{SUITE_TAG}wp") as bed:
        yield bed.start()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Put the ends of the logs under a failure."""
    report: pytest.TestReport = yield  # type: ignore[assignment]
    if report.failed:
        for bed in Testbed.live:
            text = bed.report()
            if isinstance(bed, WaypointBed) and bed.waypoint is not None:
                text += f"\n--- waypoint\n{bed.waypoint.tail()}"
            report.sections.append((f"processes of testbed {bed.tag}", text))
    return report  # type: ignore[return-value]
