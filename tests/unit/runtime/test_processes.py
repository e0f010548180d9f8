"""Cgroups and containers as /proc shows them, in every layout; and this very process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.runtime import processes

ID = "0123456789ab" + "c" * 52
OTHER = "0123456789ab" + "d" * 52


def put(proc: Path, pid: int, *lines: str) -> None:
    (proc / str(pid)).mkdir(parents=True)
    (proc / str(pid) / "cgroup").write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize(
    ("lines", "path"),
    [
        (["0::/kubepods.slice/kubepods-podx.slice/cri-1.scope"],) * 1
        + ("/kubepods.slice/kubepods-podx.slice/cri-1.scope",),
        (["5:memory:/a", "1:name=systemd:/b", "0::/kubepods/podx/1"], "/kubepods/podx/1"),
        (["0::/../../kubepods/podx/1"], "/../../kubepods/podx/1"),
        (["5:memory:/a"], ""),
    ],
    ids=["pure v2, systemd driver", "hybrid", "from a cgroup namespace", "v1 alone"],
)
def test_the_v2_cgroup_is_read_in_every_layout(tmp_path: Path, lines: list[str], path: str) -> None:
    put(tmp_path, 7, *lines)
    assert processes.cgroup_of(7, tmp_path) == path


def test_a_process_that_is_gone_has_no_cgroup(tmp_path: Path) -> None:
    assert processes.cgroup_of(7, tmp_path) == ""


@pytest.mark.parametrize(
    "path",
    [
        f"/kubepods/besteffort/podx/{ID}",
        f"/kubepods.slice/kubepods-podx.slice/cri-containerd-{ID}.scope",
        f"/kubepods.slice/kubepods-podx.slice/crio-{ID}.scope/container",
        f"/system.slice/docker-{ID}.scope/init",
        f"/kubepods-podx.slice:cri-containerd:{ID}",
    ],
)
def test_a_container_is_found_by_its_cgroup_under_both_drivers(tmp_path: Path, path: str) -> None:
    put(tmp_path, 9, f"0::{path}")
    put(tmp_path, 8, f"0::{path}")
    put(tmp_path, 3, "0::/init.scope")
    assert processes.container_process(ID, tmp_path) == 8
    assert processes.container_process(ID[:12], tmp_path) == 8


def test_who_watches_a_container_from_outside_is_not_of_it(tmp_path: Path) -> None:
    put(tmp_path, 2, f"0::/kubepods.slice/crio-conmon-{ID}.scope")
    with pytest.raises(MeshbpfError, match="no process of this host"):
        processes.container_process(ID, tmp_path)


def test_an_id_that_fits_two_containers_is_refused(tmp_path: Path) -> None:
    put(tmp_path, 8, f"0::/x/{ID}")
    put(tmp_path, 9, f"0::/x/{OTHER}")
    with pytest.raises(MeshbpfError, match="fits 2 containers"):
        processes.container_process(ID[:12], tmp_path)
    assert processes.container_process(OTHER, tmp_path) == 9


@pytest.mark.parametrize("text", ["", "web", "0123", ID + "0", ID.upper(), "../../etc/pass"])
def test_what_is_no_containers_id_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(MeshbpfError, match="not a container's id"):
        processes.container_process(text, tmp_path)


def test_this_process_has_a_namespace_and_one_that_ended_has_none() -> None:
    assert os.path.samefile(processes.netns_of(os.getpid()), "/proc/self/ns/net")
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    with pytest.raises(MeshbpfError, match=f"process {pid}: No such file"):
        processes.netns_of(pid)
