"""What becomes of attachments when pods, runtimes and agents die and come back."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.containerd.bed import CriBed
from tests.containerd.node import Made
from tests.progs.program import eventually

pytestmark = [pytest.mark.root, pytest.mark.containerd]


def test_a_killed_pod_is_detached_and_its_successor_attached_again(bed: CriBed, b: Made) -> None:
    agent = bed.agents[1]
    (first,) = bed.run_pods(("mortal", 1))
    agent.cli("attach", "--pod", first.key, "--on-agent-down", "open", "--exempt-port", "22")
    bed.attach(b)
    bed.runtimes[1].kill_pod(first)
    waiting = bed.wait_state(agent, first, "waiting")
    assert waiting.reason == "no pod of that name runs on this node"
    assert "1 waiting" in agent.cli("status").stdout
    (again,) = bed.run_pods(("mortal", 1), attempt=1)
    assert again.ip != first.ip
    info = bed.wait_state(agent, again, "attached")
    assert (info.sandbox, info.addresses) == (again.sandbox, (again.ip,))
    assert (info.on_agent_down, info.exempt_ports) == ("open", (22,))
    with bed.connect_pods(again, b) as sock:
        assert sock.makefile().readline() == f"b {again.ip}\n"
        assert [one.protocol for one in agent.carried(again.ip)] == ["HBONE"]


def test_a_removed_pod_leaves_nothing_but_the_wish_and_detach_ends_that(bed: CriBed) -> None:
    agent = bed.agents[1]
    (pod,) = bed.run_pods(("brief", 1), serve=False)
    bed.attach(pod)
    bed.runtimes[1].remove(pod.sandbox)
    bed.wait_state(agent, pod, "waiting")
    assert not os.path.exists(f"/run/netns/{pod.netns}")
    agent.cli("detach", "--pod", pod.key)
    assert bed.pod_info(agent, pod) is None
    again = bed.run_pod("brief", 1, serve=False)
    time.sleep(1.5)  # more than one look at the runtime
    assert bed.pod_info(agent, again) is None


def test_a_successor_that_the_mesh_does_not_know_waits_until_it_does(bed: CriBed) -> None:
    (first,) = bed.run_pods(("heir", 1), serve=False)
    bed.attach(first)
    bed.runtimes[1].remove(first.sandbox)
    again = bed.run_pod("heir", 1, serve=False)

    def says_why() -> bool:
        info = bed.pod_info(bed.agents[1], again)
        return info is not None and "they are not the same pod" in info.reason

    eventually("the reason names both addresses", says_why, 10.0)
    bed.tell_mesh(again)
    assert bed.wait_state(bed.agents[1], again, "attached").addresses == (again.ip,)


@pytest.mark.parametrize(
    "kill",
    [pytest.param(False, id="stopped"), pytest.param(True, id="killed", marks=pytest.mark.slow)],
)
def test_attachments_outlive_a_containerd_that_restarts(
    bed: CriBed, a: Made, b: Made, kill: bool
) -> None:
    (extra,) = bed.run_pods((f"extra{int(kill)}", 1), serve=False)
    bed.attach(a, b, extra)
    with bed.connect_pods(a, b) as sock:
        lines = sock.makefile()
        assert lines.readline() == f"b {a.ip}\n"
        with bed.runtime_down(1, kill):
            time.sleep(1.2)  # the agent has noticed
            assert bed.greeting(a, b) == f"b {a.ip}"
            assert bed.wait_state(bed.agents[1], a, "attached").sandbox == a.sandbox
        sock.sendall(b"still\n")
        assert lines.readline() == "still\n"
    # And the agent follows the pods again.
    bed.runtimes[1].remove(extra.sandbox)
    bed.wait_state(bed.agents[1], extra, "waiting", limit_s=15.0)
    assert bed.wait_state(bed.agents[1], a, "attached").sandbox == a.sandbox


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGTERM, id="stopped"),
        pytest.param(signal.SIGKILL, id="killed", marks=pytest.mark.slow),
    ],
)
def test_an_agent_that_restarts_finds_its_pods_whatever_became_of_them(
    bed: CriBed, a: Made, how: signal.Signals
) -> None:
    agent = bed.agents[1]
    name = f"renewed{how.value}"
    lost, renewed = bed.run_pods((f"lost{how.value}", 1), (name, 1))
    bed.attach(a, lost, renewed)
    agent.program.end(how)
    for pod in (lost, renewed):
        bed.runtimes[1].remove(pod.sandbox)
    (renewed,) = bed.run_pods((name, 1))
    agent.start(*agent.options)
    assert bed.wait_state(agent, a, "attached").sandbox == a.sandbox
    assert bed.wait_state(agent, renewed, "attached").addresses == (renewed.ip,)
    bed.wait_state(agent, lost, "waiting")
    with bed.connect_pods(renewed, a) as sock:
        assert sock.makefile().readline() == f"a {renewed.ip}\n"
        assert {one.protocol for one in agent.carried()} == {"HBONE"}


def test_while_the_agent_is_dead_each_pod_does_as_its_mode_says(
    bed: CriBed, a: Made, b: Made, c: Made
) -> None:
    bed.attach(b)
    bed.agents[1].cli("attach", "--pod", a.key, "--on-agent-down", "closed")
    bed.agents[1].cli("attach", "--pod", c.key, "--on-agent-down", "open")
    with bed.agents[1].dead():
        time.sleep(0.7)  # the heartbeat's limit, and some
        with pytest.raises((ConnectionRefusedError, ConnectionResetError)):
            bed.greeting(a, b)
        assert bed.greeting(c, b) == f"b {c.ip}"
    assert bed.greeting(a, b) == f"b {a.ip}"
