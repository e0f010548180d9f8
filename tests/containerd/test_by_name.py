"""Pods attached by nothing but their names, on nodes with a real containerd."""

from __future__ import annotations

import os
import threading
import time

import pytest

from tests.containerd.bed import CriBed
from tests.containerd.conftest import ACCOUNT_WAIT_S
from tests.containerd.node import NAMESPACE, PORT, Made

pytestmark = [pytest.mark.root, pytest.mark.containerd]


def refusal(bed: CriBed, *argv: str) -> str:
    """What an attach on node 1 says that is not to succeed."""
    done = bed.agents[1].cli("attach", *argv, check=False)
    assert done.returncode == 1, done.stdout
    return done.stderr


def test_a_name_is_enough_and_traffic_goes_over_hbone(bed: CriBed, a: Made, b: Made) -> None:
    for agent, pod in ((bed.agents[1], a), (bed.agents[2], b)):
        done = agent.cli("attach", "--pod", pod.key)
        assert done.stdout.split("\n")[0] == (
            f"pod {pod.key} attached: {pod.ip} as spiffe://cluster.local/ns/demo/sa/{pod.name}"
        )
    info = bed.pod_info(bed.agents[1], a)
    assert info is not None
    assert (info.by_name, info.sandbox, info.uid) == (True, a.sandbox, a.uid)
    assert info.cgroup == f"/{bed.runtimes[1].cgroup}/pod{a.uid}/{a.sandbox}"
    assert os.path.samefile(info.netns, f"/proc/{a.pid}/ns/net")
    with bed.connect_pods(a, b) as sock:
        # The server sees the pod itself, and not one of the agents.
        assert sock.makefile().readline() == f"b {a.ip}\n"
        (out,) = bed.agents[1].carried(a.ip)
        assert (out.protocol, out.destination) == ("HBONE", f"{b.ip}:{PORT}")
        assert out.peer_identity == "spiffe://cluster.local/ns/demo/sa/b"
        into = [one for one in bed.agents[2].carried() if one.direction == "inbound"]
        assert [one.peer_identity for one in into] == ["spiffe://cluster.local/ns/demo/sa/a"]
    assert "is attached already" in bed.agents[1].cli("attach", "--pod", a.key).stdout


def test_two_pods_of_one_node_talk_over_hbone_too(bed: CriBed, a: Made, c: Made) -> None:
    bed.attach(a, c)
    with bed.connect_pods(a, c) as sock:
        assert sock.makefile().readline() == f"c {a.ip}\n"
        assert {one.protocol for one in bed.agents[1].carried()} == {"HBONE"}


def test_an_unknown_pod_is_refused_with_the_runtime_named(bed: CriBed, b: Made) -> None:
    socket = bed.runtimes[1].socket
    said = refusal(bed, "--pod", f"{NAMESPACE}/nobody")
    assert f"{socket} has no ready pod demo/nobody on this node" in said
    # One of another node is as unknown.
    assert f"{socket} has no ready pod demo/b on this node" in refusal(bed, "--pod", b.key)


def test_a_host_network_pod_is_refused_with_the_reason(bed: CriBed) -> None:
    pod = bed.run_pod("hostly", 1, host_network=True, serve=False)
    said = refusal(bed, "--pod", pod.key, "--service-account", "hostly")
    assert "pod demo/hostly uses the node's own network namespace" in said
    assert bed.pod_info(bed.agents[1], pod) is None


def test_of_two_sandboxes_of_one_name_the_living_one_is_attached(bed: CriBed) -> None:
    runtime = bed.runtimes[1]
    dead = runtime.run_pod("twice", serve=False)
    runtime.stop_pod(dead.sandbox)
    (alive,) = bed.run_pods(("twice", 1), attempt=1, serve=False)
    listed = {item.id for item in runtime.list()}
    assert {dead.sandbox, alive.sandbox} <= listed
    (result,) = bed.attach(alive)
    assert (result.pod.sandbox, result.pod.addresses) == (alive.sandbox, (alive.ip,))
    runtime.remove(dead.sandbox)
    time.sleep(1.5)  # more than one look at the runtime
    assert bed.wait_state(bed.agents[1], alive, "attached").sandbox == alive.sandbox


def test_without_an_account_from_anybody_the_attach_is_refused(bed: CriBed) -> None:
    pod = bed.run_pod("stranger", 1, serve=False)
    began = time.monotonic()
    assert "its service account is not known" in refusal(bed, "--pod", pod.key)
    # The mesh state had its time to learn of the pod.
    assert time.monotonic() - began >= ACCOUNT_WAIT_S
    done = bed.agents[1].cli("attach", "--pod", pod.key, "--service-account", "guest")
    assert "as spiffe://cluster.local/ns/demo/sa/guest" in done.stdout


def test_an_account_that_the_mesh_state_contradicts_is_refused(bed: CriBed, a: Made) -> None:
    said = refusal(bed, "--pod", a.key, "--service-account", "root")
    assert "the mesh state has demo/a under a" in said


def test_the_mesh_state_may_come_to_know_the_pod_while_the_attach_waits(bed: CriBed) -> None:
    pod = bed.run_pod("late", 1, serve=False)
    later = threading.Timer(0.5, bed.tell_mesh, [pod])
    later.start()
    try:
        (result,) = bed.attach(pod)
    finally:
        later.join()
    assert result.outcome == "attached"


def test_a_place_that_is_named_does_without_the_runtime(bed: CriBed, a: Made) -> None:
    with bed.runtime_down(1):
        said = refusal(bed, "--pod", a.key)
        assert "no container runtime socket" in said or "cannot connect to the container" in said
        assert "--netns" in said or "--cri-socket" in said
        for how, place in (
            ("--netns", a.netns),
            ("--pid", str(a.pid)),
            ("--container", a.sandbox[:13]),
        ):
            bed.agents[1].cli("attach", "--pod", a.key, how, place)
            info = bed.pod_info(bed.agents[1], a)
            assert info is not None
            assert (info.state, info.by_name, info.addresses) == ("attached", False, (a.ip,))


def test_a_detached_pod_talks_as_before(bed: CriBed, a: Made, b: Made) -> None:
    bed.attach(a)
    bed.agents[1].cli("detach", "--pod", a.key)
    with bed.connect_pods(a, b) as sock:
        assert sock.makefile().readline() == f"b {a.ip}\n"
        assert bed.agents[1].carried() == []
