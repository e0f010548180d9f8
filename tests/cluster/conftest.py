"""One control plane, with two agents under it, for all tests of the folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.cluster.bed import ClusterBed
from tests.testbed import SUITE_TAG


@pytest.fixture(scope="session")
def bed() -> Iterator[ClusterBed]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    with ClusterBed(f"{SUITE_TAG}cl") as bed:
        bed.cluster.start_kubernetes()
        bed.create_objects()
        bed.cluster.new_root()
        bed.cluster.start_istiod()
        bed.launch_agents()
        bed.start_servers()
        bed.attach_all()
        yield bed
