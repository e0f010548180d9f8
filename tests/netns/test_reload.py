"""A new agent takes the place of a running one: nothing breaks, nothing is refused."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from meshbpf.agent.api import ConnectionsRequest, StatusRequest
from meshbpf.agent.api_client import RemoteError
from tests.netns.talk import echo, ends, passes, refused
from tests.progs import server
from tests.progs.inside import NETNS_DIR
from tests.progs.pod import Pod
from tests.progs.program import ROOT, eventually
from tests.testbed import SUITE_TAG, Agent, Testbed

pytestmark = [pytest.mark.root, pytest.mark.netns]


@pytest.fixture(scope="module")
def bed() -> Iterator[Testbed]:
    """Two agents of this module's own: reloads leave other processes than were started."""
    with Testbed(f"{SUITE_TAG}rel") as bed:
        # A busy machine is not to be taken for a dead agent: that would refuse, too.
        bed.start_agents("--heartbeat-limit", "5s")
        bed.start_servers()
        bed.attach_all()
        yield bed


@pytest.fixture(autouse=True)
def _no_predecessors(bed: Testbed) -> Iterator[None]:
    yield
    for agent in bed.running_agents():
        agent.end_predecessors()


def processes(agent: Agent) -> set[int]:
    """Agents of this state directory, also one that has only begun to start."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            words = path.read_bytes().split(b"\0")
            # setsid, which starts it, has the same words behind its own.
            if b"python" in words[0] and {b"run", str(agent.state_dir).encode()} <= {*words}:
                found.add(int(path.parent.name))
    return found


class Traffic:
    """Long connections from one pod to another, and short ones all the while."""

    def __init__(
        self, bed: Testbed, source: Pod, target: Pod, streams: int, every_s: float
    ) -> None:
        argv = ["nsenter", f"--net={NETNS_DIR / source.netns}"]
        argv += [sys.executable, "-m", "tests.nspawn.traffic", target.ipv4, str(server.ECHO)]
        argv += ["--streams", str(streams), "--every", str(every_s)]
        self._process = subprocess.Popen(
            argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def finish(self) -> dict[str, list[dict[str, Any]]]:
        said, _ = self._process.communicate(timeout=60.0)  # which closes its input
        report: dict[str, list[dict[str, Any]]] = json.loads(said)
        return report


@contextmanager
def traffic(bed: Testbed, streams: int, every_s: float) -> Iterator[list[Traffic]]:
    """Through the agent of node 1 in both directions."""
    both = [
        Traffic(bed, bed["n1a"], bed["n2a"], streams, every_s),
        Traffic(bed, bed["n2b"], bed["n1b"], streams, every_s),
    ]
    try:
        yield both
    finally:
        for one in both:
            if one._process.poll() is None:
                one._process.communicate(timeout=60.0)


def reload_under_traffic(bed: Testbed, streams: int, every_s: float, reloads: int) -> None:
    agent = bed.agents[1]
    with traffic(bed, streams, every_s) as both:
        for _ in range(reloads):
            began = time.monotonic()
            done = agent.reload()
            carried = agent.ask(ConnectionsRequest())
            assert {one.agent for one in carried.connections} <= {0, *agent.predecessors()}
            print(f"reload took {done.took_s:.2f} s, {carried.total} connections are carried")
            assert carried.total >= 2 * streams, "by the agent and all before it"
            time.sleep(0.5)
        after = time.monotonic()
        time.sleep(0.5)
        reports = [one.finish() for one in both]
    for report in reports:
        assert [stream["error"] for stream in report["streams"] if stream["error"]] == []
        assert len(report["streams"]) == streams
        assert [one["error"] for one in report["attempts"] if one["error"]] == []
        assert [one for one in report["attempts"] if began < one["began"] < after], "in between"
        longest = max(one["answered"] - one["began"] for one in report["attempts"])
        print(f"{len(report['attempts'])} new connections, the longest took {longest:.2f} s")
    # Each predecessor ends with its last connection, long before its deadline.
    eventually("they have ended", lambda: not agent.predecessors(), 10.0)
    status = agent.ask(StatusRequest())
    assert (status.ready, status.pid) == (True, agent.pid)


def test_a_reload_breaks_no_stream_and_refuses_no_connection(bed: Testbed) -> None:
    reload_under_traffic(bed, streams=25, every_s=0.05, reloads=1)


@pytest.mark.slow
def test_two_hundred_streams_each_way_survive_three_reloads_under_new_connections(
    bed: Testbed,
) -> None:
    reload_under_traffic(bed, streams=200, every_s=0.02, reloads=3)


def test_connections_of_predecessors_are_listed_and_counted(bed: Testbed) -> None:
    agent = bed.agents[1]
    socks = []
    pids = []
    for _ in range(2):
        socks.append(bed.connect(bed["n1a"], bed["n2a"].ipv4, server.ECHO))
        echo(socks[-1])
        pids.append(agent.pid)
        agent.reload()
    with socks[0], socks[1]:
        listed = agent.ask(ConnectionsRequest())
        own = {sock.getsockname()[1]: pid for sock, pid in zip(socks, pids, strict=True)}
        found = {int(one.source.rpartition(":")[2]): one.agent for one in listed.connections}
        assert {port: found[port] for port in own} == own

        def counted() -> bool:
            infos = agent.ask(StatusRequest()).predecessors
            return sorted((one.pid, one.connections) for one in infos) == sorted(
                (pid, 1) for pid in pids
            )

        eventually("status counts them", counted)
        assert "drains 1 connection, until" in agent.cli("status").stdout
        assert str(pids[0]) in agent.cli("connections").stdout
        for sock in socks:
            echo(sock)
    eventually("they have ended", lambda: not agent.predecessors())
    eventually("and are forgotten", lambda: agent.ask(StatusRequest()).predecessors == ())
    assert list(agent.state_dir.glob("predecessor-*")) == []


def test_a_policy_cuts_connections_of_a_predecessor(bed: Testbed) -> None:
    agent = bed.agents[2]
    with bed.connect(bed["n1a"], bed["n2a"].ipv4, server.ECHO) as sock:
        echo(sock)
        agent.reload()
        echo(sock)
        with bed.policy(action="Deny", rules=[[[{"destinationPorts": [server.ECHO]}]]]):
            assert ends(sock, 5.0)
            refused(bed, bed["n1a"], bed["n2a"].ipv4)
    passes(bed, bed["n1a"], bed["n2a"].ipv4)


def test_a_successor_that_cannot_start_leaves_the_agent_as_it_was(bed: Testbed) -> None:
    agent = bed.agents[1]
    key = bed.ca_dir / "ca-key.pem"
    hidden = key.rename(key.with_suffix(".hidden"))
    pid = agent.pid
    with bed.connect(bed["n1a"], bed["n2a"].ipv4, server.ECHO) as sock:
        echo(sock)
        try:
            done = agent.cli("reload", check=False)
        finally:
            hidden.rename(key)
        assert done.returncode == 78, "the configuration is wrong"
        assert "the new agent did not start: " in done.stderr
        assert "ca-key.pem is missing" in done.stderr
        echo(sock)
    passes(bed, bed["n1a"], bed["n2a"].ipv4)
    passes(bed, bed["n2a"], bed["n1a"].ipv4)
    status = agent.ask(StatusRequest())
    assert (status.pid, status.ready, status.predecessors) == (pid, True, ())
    agent.detach(bed["n1b"])
    agent.attach(bed["n1b"])
    assert agent.reload().predecessor == pid, "the next one succeeds"


def test_a_reload_that_is_killed_half_way_is_taken_back(bed: Testbed) -> None:
    agent = bed.agents[1]
    known = processes(agent)
    process = subprocess.Popen(
        [sys.executable, "-m", "meshbpf", "--state-dir", str(agent.state_dir), "reload"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        # While it starts Python: once it has said hello, all is over in 50 ms.
        (successor,) = eventually("there is a successor", lambda: processes(agent) - known, 20.0)
        os.kill(successor, signal.SIGKILL)
        _, said = process.communicate(timeout=30.0)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "ended without a word" in said
    passes(bed, bed["n1a"], bed["n2a"].ipv4)
    passes(bed, bed["n2a"], bed["n1a"].ipv4)
    assert agent.ask(StatusRequest()).ready


def test_a_stop_ends_the_predecessors_too(bed: Testbed) -> None:
    agent = bed.agents[1]
    with bed.connect(bed["n1a"], bed["n2a"].ipv4, server.ECHO) as sock:
        echo(sock)
        agent.reload()
        echo(sock)
        options = agent.options
        assert agent.stop() == 0
        assert ends(sock, 2.0)
        assert agent.predecessors() == []
    agent.start(*options)


def test_two_reloads_at_a_time_are_refused(bed: Testbed) -> None:
    agent = bed.agents[1]
    argv = [sys.executable, "-m", "meshbpf", "--state-dir", str(agent.state_dir), "reload"]
    known = processes(agent)
    other = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        eventually("the first is under way", lambda: processes(agent) - known, 20.0)
        with pytest.raises(RemoteError, match="a reload is under way"):
            agent.reload()
    finally:
        said, _ = other.communicate(timeout=30.0)
    assert other.returncode == 0
    successor = int(said.split("agent ")[1].split()[0])
    assert agent.ask(StatusRequest()).pid == successor
    agent.adopt(successor)
