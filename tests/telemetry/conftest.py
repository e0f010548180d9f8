"""One testbed with agents that log in JSON, for reading metrics and logs of real traffic.

Their OTLP goes to a collector on each node's loopback.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import pytest

from tests.telemetry.web import Web
from tests.testbed import SUITE_TAG, Testbed
from tests.unit.telemetry.collector import FakeCollector, collecting_in_thread

COLLECTOR_PORT = 4318


@pytest.fixture(scope="session")
def _started() -> Iterator[tuple[Testbed, Mapping[int, FakeCollector]]]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    with Testbed(f"{SUITE_TAG}te") as bed, ExitStack() as stack:
        collectors = {}
        for node in bed.agents:
            sock = bed.make_socket(node, 4)
            sock.bind(("127.0.0.1", COLLECTOR_PORT))
            sock.listen()
            collectors[node] = stack.enter_context(collecting_in_thread(sock))
        bed.start_agents(
            *("--log-format", "json", "--log-level", "info", "--metrics-grace", "1s"),
            *("--otlp", f"http://127.0.0.1:{COLLECTOR_PORT}"),
        )
        bed.start_servers()
        bed.attach_all()
        yield bed, collectors


@pytest.fixture(scope="session")
def bed(_started: tuple[Testbed, Mapping[int, FakeCollector]]) -> Testbed:
    return _started[0]


@pytest.fixture(scope="session")
def collectors(
    _started: tuple[Testbed, Mapping[int, FakeCollector]],
) -> Mapping[int, FakeCollector]:
    """By node, on its loopback."""
    return _started[1]


@pytest.fixture(scope="session")
def web(bed: Testbed) -> Web:
    return Web(bed)
