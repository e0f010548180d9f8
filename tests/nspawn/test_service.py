"""The agent as a systemd service: start, restart under traffic, stop, kill, hang."""

from __future__ import annotations

import time

import pytest

from tests.nspawn.fixture import SHOP, WEB, Traffic, attach, attached, dial, wait_active
from tests.nspawn.node import ROOT, Node
from tests.progs.program import eventually
from tests.progs.server import EXEMPT

pytestmark = pytest.mark.nspawn

STREAMS = 100
HEARTBEAT_LIMIT_S = 0.5


def drop_in(node: Node, text: str) -> None:
    """Change the unit for one test."""
    node.write("/etc/systemd/system/meshbpf.service.d/60-test.conf", text)
    node.systemctl("daemon-reload")


def main_pid(node: Node) -> int:
    return int(node.property("MainPID"))


def test_the_service_is_active_when_the_agent_is_ready(node: Node) -> None:
    node.systemctl("restart", "meshbpf.service")
    assert node.run("meshbpf", "status", check=False).returncode == 0
    assert node.property("SubState") == "running"
    assert attached(node) == {WEB.key: "attached", SHOP.key: "attached"}
    eventually(
        "status line",
        lambda: node.property("StatusText").startswith("2 pods, "),
        10.0,
    )
    assert node.property("NFileDescriptorStore") == "14", "six listeners and a namespace a pod"
    assert dial(node) == "ok"


def test_a_restart_refuses_no_connection(node: Node) -> None:
    """Old ones that the agent carries end; direct ones do not; every new one is served."""
    drop_in(node, "[Service]\nEnvironment=MESHBPF_TERMINATION_DEADLINE=1s\n")
    node.systemctl("restart", "meshbpf.service")
    old = main_pid(node)
    with Traffic(
        node, "--streams", str(STREAMS), "--direct", str(EXEMPT), "--every", "0.02"
    ) as traffic:
        time.sleep(1.0)
        began = time.monotonic()
        node.systemctl("restart", "meshbpf.service")
        done = time.monotonic()
        time.sleep(1.0)
        report = traffic.finish()
    assert main_pid(node) != old
    print(f"restart took {done - began:.2f} s, {len(report.attempts)} new connections")
    unconnected = [one for one in report.attempts if not one.connected]
    assert unconnected == []
    # Those that the old agent had accepted end with it, the others were served.
    cut = [one for one in report.attempts if one.error]
    old_ended = int(node.property("InactiveEnterTimestampMonotonic")) / 1e6
    waited = [one for one in report.attempts if not one.error and one.began > began]
    print(f"{len(cut)} cut, longest wait {max(one.answered - one.began for one in waited):.2f} s")
    assert [one for one in cut if one.began > old_ended] == []
    assert any(old_ended < one.began < done for one in waited), "some came in between"
    assert len(waited) > 50
    assert len(report.streams) == STREAMS
    assert all(stream.blocks for stream in report.streams)
    assert all(began + 1.0 < stream.ended < done + 0.5 for stream in report.streams)
    assert [stream.error for stream in report.direct if stream.error] == []
    assert all(stream.blocks for stream in report.direct)


@pytest.mark.slow
def test_a_reload_ends_no_connection_and_refuses_none(node: Node) -> None:
    """The service is another process afterwards, and the old one ends with its streams."""
    drop_in(node, "[Service]\nWatchdogSec=3s\n")
    node.systemctl("restart", "meshbpf.service")
    old = main_pid(node)
    with Traffic(node, "--streams", str(STREAMS), "--every", "0.02") as traffic:
        time.sleep(0.5)
        began = time.monotonic()
        node.systemctl("reload", "meshbpf.service")
        done = time.monotonic()
        new = main_pid(node)
        assert new not in (0, old)
        assert {old, new} <= set(processes(node)), "the old one drains"
        assert node.property("ActiveState") == "active"
        assert node.property("StatusText").startswith("2 pods, ")
        time.sleep(4.0)  # longer than the watchdog waits: it hears the new one
        report = traffic.finish()
    print(f"reload took {done - began:.2f} s, {len(report.attempts)} new connections")
    assert [stream.error for stream in report.streams if stream.error] == []
    assert all(stream.blocks for stream in report.streams)
    assert [one.error for one in report.attempts if one.error] == []
    assert [one for one in report.attempts if began < one.began < done]
    eventually("the old one has ended", lambda: old not in processes(node), 15.0)
    assert (main_pid(node), node.property("NRestarts")) == (new, "0")
    assert node.property("NFileDescriptorStore") == "14"
    assert dial(node) == "ok"
    node.systemctl("kill", "--kill-who=main", "--signal=KILL", "meshbpf.service")
    eventually("systemd is its parent: it notices", lambda: main_pid(node) not in (0, new), 15.0)
    wait_active(node)
    assert dial(node) == "ok"


def test_a_reload_that_fails_says_why_and_changes_nothing(node: Node) -> None:
    before = main_pid(node)
    config = node.read("/etc/meshbpf/config.yaml")
    node.write("/etc/meshbpf/config.yaml", config + "lease: soon\n")
    try:
        assert node.run("systemctl", "reload", "meshbpf.service", check=False).returncode != 0
        assert "lease: 'soon' is not a duration" in node.journal()
    finally:
        node.write("/etc/meshbpf/config.yaml", config)
    assert (main_pid(node), node.property("ActiveState")) == (before, "active")
    assert dial(node) == "ok"


def processes(node: Node) -> list[int]:
    """Everything of the unit that runs."""
    group = node.property("ControlGroup")
    command = f"cat /sys/fs/cgroup{group}/cgroup.procs /sys/fs/cgroup/systemd{group}/cgroup.procs"
    return [int(pid) for pid in node.shell(f"{command} 2>/dev/null || true").split()]


@pytest.mark.slow
def test_a_stop_applies_the_fail_mode_at_once(node: Node) -> None:
    node.systemctl("stop", "meshbpf.service")
    assert node.property("NFileDescriptorStore") == "0"
    before = time.monotonic()
    assert dial(node) == "ConnectionRefusedError"
    assert time.monotonic() - before < 2.0
    node.systemctl("start", "meshbpf.service")
    assert dial(node) == "ok"
    for pod in (WEB, SHOP):
        attach(node, pod, "--on-agent-down", "open")
    node.systemctl("stop", "meshbpf.service")
    assert dial(node) == "ok", "an open pod talks past the mesh"
    node.systemctl("start", "meshbpf.service")
    for pod in (WEB, SHOP):
        attach(node, pod, "--on-agent-down", "closed")


@pytest.mark.parametrize(
    ("mode", "meanwhile"),
    [("closed", "ConnectionRefusedError"), pytest.param("open", "ok", marks=pytest.mark.slow)],
)
def test_a_killed_agents_stored_listeners_take_nothing_in(
    node: Node, mode: str, meanwhile: str
) -> None:
    """Within the heartbeat's limit the pod's mode applies, and no connection hangs."""
    drop_in(node, "[Service]\nRestartSec=4s\n")
    for pod in (WEB, SHOP):
        attach(node, pod, "--on-agent-down", mode)
    with Traffic(node, "--every", "0.05") as traffic:
        time.sleep(0.5)
        killed = time.monotonic()
        node.systemctl("kill", "--kill-who=main", "--signal=KILL", "meshbpf.service")
        eventually("it is gone", lambda: node.property("SubState") == "auto-restart", 5.0)
        time.sleep(1.5)
        assert node.property("NFileDescriptorStore") == "14", "the listeners are there still"
        until = time.monotonic()
        wait_active(node)
        report = traffic.finish()
    silence = killed + HEARTBEAT_LIMIT_S + 0.2
    silent = [one for one in report.attempts if silence < one.began < until]
    assert len(silent) > 10
    assert {one.error.partition(":")[0] or "ok" for one in silent} == {meanwhile}
    assert all((one.answered or one.began) - one.began < 1.0 for one in silent)
    # Taken in before the beat was too old: the successor served them.
    waiting = [one for one in report.attempts if killed < one.began <= killed + HEARTBEAT_LIMIT_S]
    hung = [one for one in waiting if "Timeout" in one.error]
    assert hung == []
    for pod in (WEB, SHOP):
        attach(node, pod, "--on-agent-down", "closed")


def test_the_watchdog_replaces_an_agent_that_hangs(node: Node) -> None:
    drop_in(node, "[Service]\nWatchdogSec=2s\n")
    node.systemctl("restart", "meshbpf.service")
    old, restarts = main_pid(node), int(node.property("NRestarts"))
    time.sleep(3.0)
    assert main_pid(node) == old, "a healthy agent feeds it"
    node.systemctl("kill", "--kill-who=main", "--signal=STOP", "meshbpf.service")
    time.sleep(HEARTBEAT_LIMIT_S + 0.3)
    assert dial(node) == "ConnectionRefusedError"
    eventually("another agent", lambda: main_pid(node) not in (0, old), 15.0)
    wait_active(node)
    assert int(node.property("NRestarts")) == restarts + 1
    assert "Watchdog timeout" in node.journal()
    assert dial(node) == "ok"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("mesh.yaml", "workloads: [{}]\n", "mesh.yaml:1"),
        ("config.yaml", "lease: soon\n", "config.yaml:1: lease"),
    ],
)
def test_a_wrong_configuration_is_not_tried_again(
    node: Node, file: str, text: str, said: str
) -> None:
    node.write(f"/etc/meshbpf/{file}", text)
    node.systemctl("restart", "meshbpf.service", check=False)
    assert node.property("ActiveState") == "failed"
    assert node.property("ExecMainStatus") == "78"
    time.sleep(1.5)
    assert node.property("ActiveState") == "failed"
    assert node.property("NRestarts") == "0"
    assert node.property("NFileDescriptorStore") == "0"
    assert said in node.journal()
    assert dial(node) == "ConnectionRefusedError"


def test_a_detached_pod_leaves_nothing_in_the_store(node: Node) -> None:
    node.run("meshbpf", "detach", "--pod", WEB.key)
    assert node.property("NFileDescriptorStore") == "7"
    node.run("meshbpf", "detach", "--pod", SHOP.key)
    assert node.property("NFileDescriptorStore") == "0"


def test_a_pods_namespace_dies_with_its_pod(node: Node) -> None:
    """The store holds it open, and lets go."""
    node.shell(
        "ip netns add brief; ip -n brief link set lo up;"
        "ip link add vbrief type veth peer name eth0 netns brief;"
        "ip -n brief address add 198.18.1.12/32 dev eth0; ip -n brief link set eth0 up"
    )
    options = ("--netns", "brief", "--service-account", "brief")
    node.run("meshbpf", "attach", "--pod", "apps/brief", *options)
    node.shell("ip netns del brief")

    def is_gone() -> bool:
        # The node's end of the pair vanishes when the namespace does.
        return node.run("ip", "link", "show", "vbrief", check=False).returncode != 0

    eventually("the namespace is gone", is_gone, 10.0)
    assert "apps/brief" not in attached(node)
    assert node.property("NFileDescriptorStore") == "14"


def test_the_units_file_has_no_fault_and_its_score_is_in_the_docs(node: Node) -> None:
    done = node.run("systemd-analyze", "verify", "--man=no", "meshbpf.service")
    assert (done.stdout, done.stderr) == ("", "")
    table = node.run("systemd-analyze", "security", "--no-pager", "meshbpf.service").stdout
    score = table.strip().splitlines()[-1].split("meshbpf.service: ")[1].split()[0]
    docs = (ROOT / "docs/service.md").read_text()
    assert f"`systemd-analyze security` gives {score}" in docs
