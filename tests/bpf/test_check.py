"""`meshbpf check` on this machine, whose kernel the nodes of the nspawn tests share."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import pytest

from tests.testbed import MESHBPF, ROOT

GOLDEN = ROOT / "tests" / "nspawn" / "golden" / "check.txt"


def test_check_names_what_this_kernel_can_do(tmp_path: Path) -> None:
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    assert found is not None
    if (int(found[1]), int(found[2])) < (6, 6):
        pytest.skip("the golden file is of a kernel with tcx, 6.6 or newer")
    command = [MESHBPF, "check", "--state-dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    kernel, system = done.stdout.split("\n\n")[:2]
    assert [kernel, system] == GOLDEN.read_text().split("\n\n")[:2]
