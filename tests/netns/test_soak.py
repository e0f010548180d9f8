"""Minutes of churn leave an agent as it was: see tests/soak."""

from __future__ import annotations

import pytest

from tests.soak.__main__ import soak

pytestmark = [pytest.mark.root, pytest.mark.netns, pytest.mark.slow]


def test_memory_descriptors_and_tasks_hold_under_churn_of_everything() -> None:
    assert soak(60.0) == 0
