"""Pins are made only where they last: decided from mounts, and tried in real namespaces."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshbpf.agent.datapath.bpffs import MOUNT_POINT, BpffsError, ensure, is_mounted_lastingly
from meshbpf.agent.datapath.mounts import Mount, mounted_at, mounts_of

ROOT = Mount(1, "254:0", Path("/"), "ext4")
BPFFS = Mount(2, "0:39", MOUNT_POINT, "bpf")
HOST = (ROOT, BPFFS)
COPIED_ROOT = Mount(11, "254:0", Path("/"), "ext4")


def test_in_the_namespace_of_pid_1_a_bpffs_lasts() -> None:
    assert is_mounted_lastingly(HOST, HOST, MOUNT_POINT)


def test_in_the_namespace_of_pid_1_a_missing_bpffs_may_be_mounted() -> None:
    assert not is_mounted_lastingly((ROOT,), (ROOT,), MOUNT_POINT)


def test_the_hosts_bpffs_lasts_in_a_private_namespace_too() -> None:
    ours = (COPIED_ROOT, Mount(12, BPFFS.device, MOUNT_POINT, "bpf"))
    assert is_mounted_lastingly(ours, HOST, MOUNT_POINT)


def test_a_bpffs_of_a_private_namespace_is_refused() -> None:
    ours = (COPIED_ROOT, Mount(12, "0:77", MOUNT_POINT, "bpf"))
    with pytest.raises(BpffsError, match="vanish with the agent") as caught:
        is_mounted_lastingly(ours, HOST, MOUNT_POINT)
    assert "nsenter --net=" in caught.value.hint


def test_nothing_is_mounted_in_a_private_namespace() -> None:
    with pytest.raises(BpffsError, match="no bpffs"):
        is_mounted_lastingly((COPIED_ROOT,), HOST, MOUNT_POINT)


def test_something_else_on_top_of_bpffs_is_not_bpffs() -> None:
    over = Mount(3, "0:50", MOUNT_POINT, "tmpfs")
    assert not is_mounted_lastingly((*HOST, over), (*HOST, over), MOUNT_POINT)


ENSURE = """
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.datapath.bpffs import ensure
try:
    ensure()
    ensure()  # again: nothing to do
except MeshbpfError as error:
    print(error.code, error)
else:
    print("lasting")
"""


def _say(*prefix: str, before: str = "") -> str:
    """What `ensure` says when run under `prefix`, after the shell commands `before`."""
    script = f'set -e; {before} exec "$0" -c "$1"'
    ended = subprocess.run(
        [*prefix, "sh", "-c", script, sys.executable, ENSURE],
        check=True, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    return ended.stdout


@pytest.fixture
def netns() -> Iterator[str]:
    name = f"ld-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    yield name
    subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.mark.root
def test_here_bpffs_lasts_once_it_is_ensured() -> None:
    ensure()
    mount = mounted_at(MOUNT_POINT, mounts_of())
    assert mount is not None
    assert mount.kind == "bpf"


@pytest.mark.root
def test_ip_netns_exec_is_refused(netns: str) -> None:
    said = _say("ip", "netns", "exec", netns)
    assert said.startswith("bpffs-private no bpffs")


@pytest.mark.root
def test_without_root_or_bpf_the_refusal_is_about_that(as_nobody: tuple[str, ...]) -> None:
    nobody = _say(*as_nobody)
    assert nobody.startswith("bpf-")
    assert "needs root" in nobody
    without = _say(sys.executable, "-m", "tests.progs.without_bpf")
    assert "CONFIG_BPF_SYSCALL" in without


@pytest.mark.root
def test_nsenter_net_is_fine(netns: str) -> None:
    ensure()
    assert _say("nsenter", f"--net=/run/netns/{netns}") == "lasting\n"


@pytest.mark.root
def test_private_mounts_over_the_hosts_bpffs_are_fine() -> None:
    ensure()
    assert _say("unshare", "--mount") == "lasting\n"


@pytest.mark.root
def test_a_private_bpffs_over_the_hosts_is_refused() -> None:
    ensure()
    said = _say("unshare", "--mount", before=f"mount -t bpf bpf {MOUNT_POINT};")
    assert said.startswith("bpffs-private the bpffs at /sys/fs/bpf is mounted only in")


@pytest.mark.root
def test_a_container_with_an_init_of_its_own_mounts_its_own() -> None:
    said = _say(
        "unshare", "--mount", "--pid", "--fork", "--mount-proc",
        before="umount --lazy /sys; mount -t sysfs sysfs /sys;",
    )  # fmt: skip
    assert said == "lasting\n"
