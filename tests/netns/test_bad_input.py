"""What a person gets who asks for something that cannot be: a reason, a hint, an exit status."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from meshbpf.agent.api import StatusRequest
from tests.netns.talk import passes
from tests.progs.inside import socket_inside
from tests.progs.program import eventually
from tests.testbed import BYTECODE_DIR, MESHBPF, SUITE_TAG, Testbed, copy_bytecode

pytestmark = [pytest.mark.root, pytest.mark.netns]

NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


@pytest.fixture(scope="module")
def half() -> Iterator[Testbed]:
    """An agent on node 1 and none on node 2, where failing ones are started."""
    with Testbed(f"{SUITE_TAG}bad") as bed:
        bed.make_ca()
        bed.agents[1].start()
        bed.start_servers()
        bed.agents[1].attach(bed["n1a"])
        yield bed


@pytest.fixture
def options(half: Testbed, tmp_path: Path) -> dict[str, str]:
    """Options of `run` that would work on node 2; each test spoils one."""
    return {
        "--node": "node2",
        "--state-dir": str(tmp_path / "state"),
        "--ca-dir": str(half.ca_dir),
        "--local-xds": str(half.mesh_file),
    }


def fails(bed: Testbed, argv: Sequence[str], status: int, *words: str, node: int = 2) -> str:
    """The command ends with that status and says these words, and no traceback."""
    done = bed.run(bed.node_netns(node), [*argv], check=False, limit_s=30)
    said = done.stdout + done.stderr
    assert done.returncode == status, said
    assert "Traceback" not in said
    for word in words:
        assert word in said
    assert "hint" in said.lower()
    return said


def run(options: dict[str, str]) -> list[str]:
    return [str(MESHBPF), "run", *(word for pair in options.items() for word in pair)]


def cli(bed: Testbed, *argv: str) -> list[str]:
    return [str(MESHBPF), "--state-dir", str(bed.agents[1].state_dir), *argv]


def test_an_unknown_pod_cannot_be_attached(half: Testbed) -> None:
    argv = cli(half, "attach", "--pod", "apps/nobody", "--netns", half["n1b"].netns)
    fails(half, argv, 1, "apps/nobody", node=1)


def test_an_unknown_pod_cannot_be_detached(half: Testbed) -> None:
    fails(half, cli(half, "detach", "--pod", "apps/nobody"), 1, "apps/nobody", node=1)


@pytest.mark.parametrize("netns", ["nowhere", "/run/netns/nowhere", "/etc/hostname"])
def test_a_missing_netns_cannot_be_attached(half: Testbed, netns: str) -> None:
    argv = cli(half, "attach", "--pod", "apps/n1b", "--netns", netns)
    fails(half, argv, 1, netns, node=1)
    assert half.agents[1].pod_state("apps/n1b") == "unknown"


def test_run_needs_root(half: Testbed, options: dict[str, str]) -> None:
    fails(half, [*NOBODY, *run(options)], 77, "root")


def test_the_control_socket_is_closed_to_other_users(half: Testbed) -> None:
    fails(half, [*NOBODY, *cli(half, "status")], 77, str(half.agents[1].state_dir), node=1)


def test_a_control_socket_of_another_user_is_not_believed(half: Testbed, tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        os.chown(path, 65534, 65534)
        argv = [str(MESHBPF), "--state-dir", str(tmp_path), "status"]
        fails(half, argv, 77, str(path), "another user")


def test_without_an_agent_a_command_says_that_none_runs(half: Testbed, tmp_path: Path) -> None:
    fails(half, [str(MESHBPF), "--state-dir", str(tmp_path), "status"], 69, str(tmp_path))


def test_a_second_agent_may_not_share_a_state_directory(
    half: Testbed, options: dict[str, str]
) -> None:
    options["--state-dir"] = str(half.agents[1].state_dir)
    fails(half, run(options), 1, options["--state-dir"])
    passes(half, half["n1a"], half["n2x"].ipv4)


def test_a_readiness_port_in_use_is_named(half: Testbed, options: dict[str, str]) -> None:
    with socket_inside(half.node_netns(2), socket.AF_INET6) as taken:
        taken.bind(("::", 15021))
        taken.listen()
        fails(half, run(options), 1, "15021")


def test_a_kernel_without_bpf_is_named(half: Testbed, options: dict[str, str]) -> None:
    copy_bytecode(BYTECODE_DIR, Path(options["--state-dir"], "cache"))
    argv = [sys.executable, "-m", "tests.progs.without_bpf", *run(options)]
    fails(half, argv, 1, "BPF")


def test_missing_kernel_headers_are_named_with_their_package(
    half: Testbed, options: dict[str, str]
) -> None:
    # In a mount namespace of its own the machine has none; the bpffs is the host's still.
    archive = "/sys/kernel/kheaders.tar.xz"
    hide = (
        "mount -t tmpfs none /usr/src && mount -t tmpfs none /lib/modules && "
        f"if [ -e {archive} ]; then mount --bind /dev/null {archive}; fi && "
        'exec "$@"'
    )
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", hide, "sh", *run(options)]
    fails(half, argv, 1, "kernel headers", "apt-get install linux-headers-")


def test_run_refuses_a_bpffs_that_would_die_with_it(half: Testbed, options: dict[str, str]) -> None:
    # `ip netns exec` gives a /sys of its own, in which no pin lasts.
    argv = ["ip", "netns", "exec", half.node_netns(2), *run(options)]
    fails(half, argv, 1, "mount namespace", "nsenter --net=")


def test_a_missing_ca_is_not_made(half: Testbed, options: dict[str, str], tmp_path: Path) -> None:
    options["--ca-dir"] = str(tmp_path / "ca")
    fails(half, run(options), 78, options["--ca-dir"], "ca init")
    assert not (tmp_path / "ca").exists()


def test_a_ca_key_that_others_may_read_is_refused(
    half: Testbed, options: dict[str, str], tmp_path: Path
) -> None:
    options["--ca-dir"] = str(shutil.copytree(half.ca_dir, tmp_path / "ca"))
    (tmp_path / "ca" / "ca-key.pem").chmod(0o644)
    fails(half, run(options), 78, "ca-key.pem", "0600")


def test_a_ca_is_not_overwritten(half: Testbed) -> None:
    key = half.ca_dir / "ca-key.pem"
    before = key.read_bytes()
    fails(half, [str(MESHBPF), "ca", "init", str(half.ca_dir)], 78, str(half.ca_dir))
    assert key.read_bytes() == before


def test_an_unreadable_mesh_file_is_named(half: Testbed, options: dict[str, str]) -> None:
    options["--local-xds"] = "/run/meshbpf-testbed/no-such-file.yaml"
    fails(half, run(options), 78, options["--local-xds"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("workloads:\n- name: [a\n  b: c\n", ("mesh.yaml:3",)),
        ("workloads:\n- name: a\n  nonsense: 1\n", ("mesh.yaml:3", "nonsense")),
        (
            "workloads:\n- name: a\n  namespace: x\n  services: {}\n  workloadIps: [10.0.0.x]\n",
            ("mesh.yaml:5", "workloadIps", "10.0.0.x"),
        ),
    ],
    ids=["syntax", "unknown-key", "bad-address"],
)
def test_a_malformed_mesh_file_is_refused_with_line_and_field(
    half: Testbed, options: dict[str, str], tmp_path: Path, text: str, words: tuple[str, ...]
) -> None:
    options["--local-xds"] = str(tmp_path / "mesh.yaml")
    (tmp_path / "mesh.yaml").write_text(text)
    fails(half, run(options), 78, *words)


def test_a_malformed_reload_keeps_the_last_good_state(half: Testbed) -> None:
    agent = half.agents[1]
    good = half.mesh_file.read_text()
    version = agent.ask(StatusRequest()).state.version
    try:
        half.mesh_file.write_text(good + "nonsense: 1\n")
        error = eventually("the agent refuses it", lambda: agent.ask(StatusRequest()).state.error)
        assert error is not None
        assert "nonsense" in error.what
        assert agent.ask(StatusRequest()).state.version == version
        passes(half, half["n1x"], half["n1a"].ipv4)
    finally:
        half.mesh_file.write_text(good)
    eventually("it is content again", lambda: agent.ask(StatusRequest()).state.error is None)
