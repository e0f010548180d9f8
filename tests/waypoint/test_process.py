"""The process: no rights, several workers, an orderly end, wrong options."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import NOBODY
from tests.progs.pod import NAMESPACE
from tests.progs.program import Program, eventually
from tests.testbed import MESHBPF
from tests.waypoint.bed import Inside, WaypointBed, read, vip

pytestmark = [pytest.mark.root, pytest.mark.netns]


@pytest.fixture
def other(bed: WaypointBed, as_nobody: tuple[str, ...]) -> Iterator[Program]:
    """The waypoint anew: three workers under a user without rights, in place of the first one."""
    assert bed.waypoint is not None
    bed.waypoint.end()
    bed.directory.parent.chmod(0o711)  # to be passed through, not to be listed
    ca = bed.directory / "ca-of-nobody"
    shutil.copytree(bed.ca_dir, ca)
    state = bed.directory / "waypoint-of-nobody"
    state.mkdir(mode=0o700)
    for path in (ca, state, *ca.iterdir()):
        os.chown(path, NOBODY, NOBODY)
    argv = [*as_nobody, str(MESHBPF), "waypoint", "--name", f"{NAMESPACE}/waypoint"]
    argv += ["--ca-dir", str(ca), "--manifests", str(bed.mesh_file.parent)]
    argv += ["--state-dir", str(state), "--address", bed["wp"].ipv4, "--workers", "3"]
    bed.waypoint = Program(bed.directory, "waypoint3", bed["wp"].netns, argv)
    bed.servers["waypoint"] = bed.waypoint
    try:
        bed.wait_waypoint(60.0)
        yield bed.waypoint
    finally:
        bed.waypoint.end()
        shutil.rmtree(ca)
        shutil.rmtree(state)
        bed.start_waypoint()


def workers(program: Program) -> list[int]:
    # A child is its starting thread's, and trio starts processes in threads.
    lists = Path(f"/proc/{program.pid}/task").glob("*/children")
    return [int(each) for path in lists for each in path.read_text().split()]


def test_three_workers_without_rights_share_the_port(bed: WaypointBed, other: Program) -> None:
    processes = workers(other)
    assert len(processes) == 3
    for pid in (other.pid, *processes):
        status = Path(f"/proc/{pid}/status").read_text()
        assert re.search(rf"^Uid:\t{NOBODY}\t", status, re.MULTILINE)
        assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE)
    for _ in range(12):
        assert bed.get("echo-v1").status == 200
    # One page for all: what single workers have counted is summed.
    assert bed.metric("meshbpf_waypoint_requests_total") == 12
    os.kill(processes[0], signal.SIGKILL)
    eventually("a dead worker is started again", lambda: len(workers(other)) == 3, 15.0)
    bed.wait_waypoint(30.0)
    assert bed.get("echo-v1").status == 200
    assert other.end(signal.SIGTERM) == 0
    assert all(not Path(f"/proc/{pid}").exists() for pid in processes)


def test_clients_with_open_connections_come_back_after_a_restart(bed: WaypointBed) -> None:
    conn = Inside(bed["n1a"], vip("echo-v1"), 80)
    conn.request("GET", "/", headers={"Host": "echo"})
    assert read(conn).status == 200
    assert bed.waypoint is not None
    assert bed.waypoint.end(signal.SIGTERM) == 0
    bed.start_waypoint()
    conn.close()
    assert bed.get("echo-v1").status == 200


@pytest.mark.parametrize(
    ("options", "status", "told"),
    [
        (["--name", "waypoint", "--ca-dir", "/x", "--manifests", "/x"], 2, "no namespace"),
        (["--name", "a/b", "--ca-dir", "/x"], 78, "--manifests"),
        (["--name", "a/b", "--ca-dir", "/x", "--manifests", "/x", "--local-xds", "/y"], 78, "one"),
        (["--name", "a/b", "--ca-dir", "/nowhere", "--manifests", "/x"], 78, "no CA"),
        (["--name", "a/b", "--ca-dir", "/x", "--manifests", "/x", "--address", "x"], 2, "IP"),
    ],
)
def test_wrong_options_are_told_with_their_status(
    options: list[str], status: int, told: str
) -> None:
    argv = [str(MESHBPF), "waypoint", *options, "-o", "json"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert done.returncode == status
    assert told in json.dumps(json.loads(done.stderr))
