"""The testbed cleans up after itself, however its process ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.progs.inside import NETNS_DIR
from tests.progs.program import ROOT, BedError, eventually
from tests.testbed import RUN_DIR, SUITE_TAG, Testbed

pytestmark = [pytest.mark.root, pytest.mark.netns]

TAG = f"{SUITE_TAG}self"
BUILD = f"""
import time
from tests.testbed import Testbed
with Testbed("{TAG}") as bed:
    bed.start_servers()
    print(*(server.pid for server in bed.servers.values()), flush=True)
    time.sleep(60)
"""


def left() -> list[str]:
    paths = [*NETNS_DIR.glob(f"{TAG}-*"), *RUN_DIR.glob(f"{TAG}*")]
    return [str(path) for path in paths]


def alive(pids: list[int]) -> list[int]:
    # A process that nobody has waited for yet keeps its number, but no command line.
    paths = [(pid, Path(f"/proc/{pid}/cmdline")) for pid in pids]
    return [pid for pid, path in paths if path.exists() and path.read_bytes()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_an_interrupted_testbed(number: signal.Signals) -> None:
    argv = [sys.executable, "-c", BUILD]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT) as run:
        assert run.stdout is not None
        pids = [int(word) for word in run.stdout.readline().split()]
        assert len(alive(pids)) == 6
        with pytest.raises(BedError, match="another process"), Testbed(TAG):
            pass
        run.send_signal(number)
        run.wait(20)
    if number is signal.SIGKILL:
        assert left()
        # The next run of the tag removes what the killed one could not.
        with Testbed(TAG):
            assert alive(pids) == []
    eventually("the processes end", lambda: not alive(pids))
    assert left() == []


def test_a_testbed_is_built_in_a_moment() -> None:
    began = time.monotonic()
    with Testbed(TAG) as bed:
        bed.start_servers()
    assert time.monotonic() - began < 10
    assert left() == []
