"""The Debian package: what it brings, and what it leaves behind."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshbpf import __version__
from tests.nspawn import fixture
from tests.nspawn.fixture import SHOP, WEB, Traffic, attached, dial
from tests.nspawn.node import PACKAGES, Node

pytestmark = pytest.mark.nspawn

# What dpkg, systemd and the kernel keep of anything that ever ran.
KEPT = re.compile(r"/(var/lib/(dpkg|systemd)|var/log|var/cache|var/tmp|run|tmp|mnt)(/|$)|/opt$")
GOLDEN = Path(__file__).with_name("golden")


@pytest.fixture
def fresh(tree: Path, packages: Path) -> Iterator[Node]:
    """A booted node that never had meshbpf."""
    with Node("b", tree, packages) as node:
        yield node


def files(node: Node) -> set[str]:
    listing = node.shell("find / -xdev -mindepth 1 -printf '%p %l\\n'").splitlines()
    return {line for line in listing if not KEPT.match(line.split(" ", 1)[0])}


def hooks(node: Node) -> str:
    """Whatever of an attachment there could be in a pod, in its veth, and in bpffs."""
    return node.shell(
        "for pod in web shop; do ip -n $pod rule; ip -n $pod route show table all;"
        "ip -n $pod -d link; ip -d link show v$pod; done;"
        "ls -R /sys/fs/bpf 2>/dev/null || true"
    )


def without_counters(text: str) -> str:
    return re.sub(r"(valid|preferred)_lft \S+", "", text)


@pytest.mark.slow
def test_installed_removed_and_purged_it_leaves_the_machine_as_it_was(fresh: Node) -> None:
    fixture.make_pods(fresh)
    fresh.shell("mkdir -p /sys/fs/bpf; mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf")
    files_before, hooks_before = files(fresh), without_counters(hooks(fresh))

    # Installed: enabled, and not started with a configuration that is not complete.
    said = fresh.run("sh", "-c", f"dpkg -i {PACKAGES}/meshbpf_*.deb 2>&1").stdout
    assert "not started yet" in said
    assert fresh.systemctl("is-enabled", "meshbpf.service").strip() == "enabled"
    assert fresh.property("ActiveState") == "inactive"
    assert fresh.systemctl("is-system-running", check=False).strip() == "running"
    assert fresh.run("meshbpf", "--version").stdout == f"meshbpf {__version__}\n"
    fixture.configure(fresh)
    fresh.systemctl("start", "meshbpf.service")
    for pod in (WEB, SHOP):
        fixture.attach(fresh, pod)

    with fixture.server(fresh, SHOP):
        assert dial(fresh) == "ok"

        # Removed: the pods are out of the mesh and talk on, with no trace in the kernel.
        said = fresh.run("dpkg", "--remove", "meshbpf").stdout
        assert "pod apps/shop detached\n" in said
        assert "pod apps/web detached\n" in said
        assert without_counters(hooks(fresh)) == hooks_before
        assert dial(fresh) == "ok"
    assert fresh.run("test", "-e", "/opt/meshbpf", check=False).returncode == 1
    assert fresh.run("test", "-e", "/etc/meshbpf/config.yaml", check=False).returncode == 0
    assert fresh.run("test", "-s", "/var/lib/meshbpf/agent-id", check=False).returncode == 0
    assert fresh.run("test", "-e", "/var/lib/meshbpf/attachments.json", check=False).returncode == 1
    assert fresh.run("systemctl", "status", "meshbpf.service", check=False).returncode == 4

    # Purged: not a file more than before.
    fresh.run("dpkg", "--purge", "meshbpf")
    assert files(fresh) == files_before
    assert fresh.systemctl("is-system-running", check=False).strip() == "running"


@pytest.mark.slow
def test_an_upgrade_under_traffic_ends_no_connection(node: Node) -> None:
    """Another agent, the same pods, and a configuration that a person changed stays."""
    old = node.property("MainPID")
    node.shell(
        f"cd /var/tmp; dpkg-deb -R {PACKAGES}/meshbpf_*.deb next;"
        "sed -i 's/^Version: .*/Version: 99.0-1/' next/DEBIAN/control;"
        "dpkg-deb -Znone -b next next.deb; rm -r next"
    )
    node.write("/etc/meshbpf/config.yaml", node.read("/etc/meshbpf/config.yaml") + "# ours\n")
    with Traffic(node, "--streams", "10", "--every", "0.05") as traffic:
        node.run("dpkg", "--force-confdef", "-i", "/var/tmp/next.deb")
        done = time.monotonic()
        time.sleep(0.5)
        report = traffic.finish()
    assert node.property("MainPID") not in ("0", old)
    assert node.property("ActiveState") == "active"
    assert [one.error for one in report.attempts if one.error] == []
    assert [one.error for one in report.streams if one.error] == []
    assert any(one.answered > done for one in report.attempts)
    assert attached(node) == {WEB.key: "attached", SHOP.key: "attached"}
    assert node.read("/etc/meshbpf/config.yaml").endswith("# ours\n")


def test_the_package_brings_pages_completions_and_its_licence(machine: Node) -> None:
    shipped = machine.run("dpkg", "-L", "meshbpf").stdout.splitlines()
    for path in (
        "/usr/share/man/man8/meshbpf.8.gz",
        "/usr/share/man/man8/meshbpf-attach.8.gz",
        "/usr/share/bash-completion/completions/meshbpf",
        "/usr/share/zsh/vendor-completions/_meshbpf",
        "/usr/share/fish/vendor_completions.d/meshbpf.fish",
        "/usr/share/doc/meshbpf/copyright",
        "/usr/share/doc/meshbpf/changelog.gz",
        "/lib/systemd/system/meshbpf.service",
        "/etc/meshbpf/config.yaml",
    ):
        assert path in shipped
    # Of a configuration file that a person changed it says so, with a "c".
    verified = machine.run("dpkg", "--verify", "meshbpf", check=False).stdout.splitlines()
    assert [line for line in verified if " c " not in line] == []
    # Nothing of the folder it was built in, and no script that only works there.
    found = machine.run("grep", "-rlI", "meshbpf-deb", "/opt/meshbpf", "/usr/share", check=False)
    assert found.stdout == ""


@pytest.mark.slow
def test_nothing_is_written_into_the_package_by_running_it(node: Node) -> None:
    node.systemctl("restart", "meshbpf.service")
    node.run("meshbpf", "status")
    owned = set(node.run("dpkg", "-L", "meshbpf").stdout.splitlines())
    there = set(node.shell("find /opt/meshbpf").splitlines())
    assert there - owned == set()


def test_check_says_what_a_node_in_a_container_can_do(node: Node) -> None:
    said = node.run("meshbpf", "check", check=False).stdout
    # Settings, and what else works on packets, are the machine's that runs this test.
    kernel, system, capture, _settings, _beside, agent = said.split("\n\n")[:6]
    parts = [kernel, system, capture, re.sub(r"node1, \S+", "node1, VERSION", agent)]
    assert "\n\n".join(parts) + "\n" == (GOLDEN / "check.txt").read_text()
