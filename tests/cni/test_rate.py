"""Pods that come and go by the hundred: the time of each call of the plugin, and what is left."""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path

import pytest

from tests.cni.plugin import Plugin
from tests.cni.test_verbs import pins
from tests.testbed import Testbed

pytestmark = [pytest.mark.root, pytest.mark.cni]

ROUNDS = 500
"""A pod is one ADD and one DEL."""
WINDOW_S, CALL_MS = 60.0, 20.0
"""For all, and for the median of the calls; docs/performance.md has the figures."""


def test_500_pods_come_and_go_and_nothing_is_left(
    bed: Testbed, plugin: Plugin, capsys: pytest.CaptureFixture[str]
) -> None:
    pods = [bed.add_pod(f"rate{number}", 1) for number in range(10)]
    bed.wait_mesh()
    agent = bed.agents[1]
    # One round first: descriptors of programs loaded ahead are there from then on.
    for command in ("ADD", "DEL"):
        assert plugin.run(command, pods[0].name, pods[0].netns, "c").status == 0
    before = pins(agent.agent_id())
    descriptors = len(list(Path(f"/proc/{agent.pid}/fd").iterdir()))
    took_ms: dict[str, list[float]] = {"ADD": [], "DEL": []}
    began, cpu_before_s = time.monotonic(), cpu_s(agent.pid)
    for number in range(ROUNDS):
        pod, container = pods[number % len(pods)], f"c{number}"
        for command in ("ADD", "DEL"):
            at = time.monotonic()
            done = plugin.run(command, pod.name, pod.netns, container)
            took_ms[command].append((time.monotonic() - at) * 1000)
            assert done.status == 0, done.text
    whole_s = time.monotonic() - began
    cpu_ms = (cpu_s(agent.pid) - cpu_before_s) * 1000 / ROUNDS
    with capsys.disabled():
        for command, values in took_ms.items():
            cuts = statistics.quantiles(values, n=100)
            print(f"\n{command}: p50 {cuts[49]:.1f} ms, p99 {cuts[98]:.1f} ms", end="")
        print(f"; {ROUNDS} pods in {whole_s:.1f} s, {cpu_ms:.1f} ms of the agent's CPU a pod")
    assert whole_s < WINDOW_S
    assert all(statistics.median(values) < CALL_MS for values in took_ms.values()), took_ms
    assert pins(agent.agent_id()) == before
    assert json.loads((agent.state_dir / "attachments.json").read_text())["attachments"] == []
    assert len(list(Path(f"/proc/{agent.pid}/fd").iterdir())) <= descriptors + 5
    for pod in pods:
        bed.remove_pod(pod)


def cpu_s(pid: int) -> float:
    """Seconds of CPU that a process and its threads have used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
