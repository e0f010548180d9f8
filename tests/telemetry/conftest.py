"""One testbed with agents that log in JSON, for reading metrics and logs of real traffic."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.telemetry.web import Web
from tests.testbed import SUITE_TAG, Testbed


@pytest.fixture(scope="session")
def bed() -> Iterator[Testbed]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    with Testbed(f"{SUITE_TAG}te") as bed:
        bed.start_agents("--log-format", "json", "--log-level", "info", "--metrics-grace", "1s")
        bed.start_servers()
        bed.attach_all()
        yield bed


@pytest.fixture(scope="session")
def web(bed: Testbed) -> Web:
    return Web(bed)
