"""What tests of several folders share."""

from __future__ import annotations

import subprocess
import sys

import pytest

NOBODY = 65534


@pytest.fixture
def as_nobody() -> tuple[str, ...]:
    """What to put before a command to run it without any right."""
    prefix = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    if subprocess.run([*prefix, sys.executable, "-c", ""], capture_output=True).returncode:
        pytest.skip("the checkout is in a folder that other users may not enter")
    return prefix
