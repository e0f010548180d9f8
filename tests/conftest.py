"""What tests of several folders share."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.progs.pod import Family
from tests.testbed import remove_empty_pins

NOBODY = 65534


@pytest.fixture(params=[4, 6], ids=["ipv4", "ipv6"])
def family(request: pytest.FixtureRequest) -> Family:
    """For tests that are the same over both."""
    chosen: Family = request.param
    return chosen


@pytest.fixture
def as_nobody() -> tuple[str, ...]:
    """What to put before a command to run it without any right."""
    prefix = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    if subprocess.run([*prefix, sys.executable, "-c", ""], capture_output=True).returncode:
        pytest.skip("the checkout is in a folder that other users may not enter")
    return prefix


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`-m NAME` means the quick tests of that name; slow ones run where the expression says so."""
    expression = config.option.markexpr
    if not expression or "slow" in expression:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


def pytest_sessionfinish() -> None:
    """Agents of tests that need no testbed leave no folder either."""
    remove_empty_pins()
