"""The benchmark's own parts: what its figures mean, and that its load is real."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from xml.etree import ElementTree

import pytest

from tests.bench import chart, figures, load, quick, rig
from tests.bench.figures import Spread, Target

LIFETIME_S = "60"
SECONDS = "0.2"


@pytest.fixture(scope="module", params=["127.0.0.1", "::1"])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """The generator's server on a free port of loopback: address and port."""
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((request.param, 0))
        port = str(probe.getsockname()[1])
    argv = [str(load.build()), "server", request.param, port, LIFETIME_S]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == {"event": "ready"}
        yield request.param, port
        process.terminate()


def run(mode: str, server: tuple[str, str], *options: str) -> dict[str, float]:
    argv = [str(load.build()), mode, *server, SECONDS, *options]
    answer: dict[str, float] = json.loads(subprocess.check_output(argv, text=True))
    return answer


@pytest.mark.parametrize("direction", ["up", "down"])
def test_stream_counts_bytes_where_they_arrive(server: tuple[str, str], direction: str) -> None:
    answer = run("stream", server, "2", direction)
    assert answer["streams"] == 2
    assert answer["bytes"] > 1 << 20
    assert answer["gbit_s"] == pytest.approx(answer["bytes"] * 8e-9 / answer["seconds"], rel=1e-3)


def test_round_trips_are_counted_and_ordered(server: tuple[str, str]) -> None:
    answer = run("rtt", server)
    assert answer["bytes"] == 64
    assert 0 < answer["p50_us"] <= answer["p99_us"]
    # One after the other: their times fill the whole run.
    assert answer["count"] * answer["mean_us"] == pytest.approx(answer["seconds"] * 1e6, rel=0.05)


def test_rate_counts_whole_exchanges(server: tuple[str, str]) -> None:
    answer = run("rate", server, "4")
    assert answer["failed"] == 0
    assert answer["connections"] > 10


def test_a_closed_port_is_a_failure_and_no_figure() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    for mode, options in (("stream", ["1", "up"]), ("rtt", []), ("rate", ["1"])):
        argv = [str(load.build()), mode, "127.0.0.1", port, SECONDS, *options]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stdout == ""
        assert "Connection refused" in done.stderr


def test_cpu_time_counts_children() -> None:
    before = rig.cpu_time_s(os.getpid())
    busy = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ntime.sleep(20)"
    with subprocess.Popen(["/usr/bin/python3", "-c", busy], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        spent = rig.cpu_time_s(os.getpid()) - before
        child.kill()
    assert 0.25 < spent < 2.0


def test_ratios_are_taken_within_a_round() -> None:
    slow = {number: _sample(number, figure) for number, figure in ((0, 1.0), (1, 10.0))}
    fast = {number: _sample(number, figure) for number, figure in ((0, 2.0), (1, 20.0), (2, 9.0))}
    assert figures.ratio(slow, fast) == Spread(0.5, 0.5, 0.5, 2)
    assert figures.ratio(slow, {}) is None


def test_a_target_knows_which_way_is_better() -> None:
    ratio = Spread(1.0, 2.0, 3.0, 3)
    assert Target(rig.THEIRS, "up", "cross-node", 2.5).met(ratio)
    assert not Target(rig.THEIRS, "up", "cross-node", 3.5).met(ratio)
    assert Target(rig.THEIRS, "rtt", "cross-node", 1.5, less_is_better=True).met(ratio)
    assert not Target(rig.THEIRS, "rtt", "cross-node", 0.9, less_is_better=True).met(ratio)


def test_every_target_names_a_task_and_a_row_that_are_measured() -> None:
    assert {target.task for target in figures.TARGETS} <= {task.name for task in load.TASKS}
    assert {target.row for target in figures.TARGETS} <= {row.name for row in rig.ROWS}


def test_the_page_and_its_chart_hold_every_mesh_that_was_measured() -> None:
    samples = [
        dataclasses.replace(_sample(number, 2.0), mesh=mesh, row=row)
        for number in range(3)
        for mesh, row in (
            (rig.DIRECT, "two nodes"),
            (rig.OURS, "cross-node"),
            (rig.THEIRS, "cross-node"),
            (rig.STEERED, "cross-node"),
        )
    ]
    text = figures.page(samples, [("when", "now")], "make bench")
    assert (
        "| Throughput, one stream up, cross-node | 1.00 | 1.00 to 1.00 | at least 1.2: MISSED"
        in text
    )
    assert "## steered ztunnel beside ztunnel" in text
    drawing = ElementTree.fromstring(chart.draw(samples))
    said = {element.text for element in drawing.iter() if element.text}
    assert {"no mesh", "meshbpf", "ztunnel", "steered ztunnel", "cross-node"} <= said


def test_quick_ratios_are_medians_of_ratios_on_the_same_path() -> None:
    (row,) = [row for row in rig.ROWS if row.name == "cross-node"]
    rounds = [
        {("up", rig.OURS, "cross-node"): ours, ("up", rig.DIRECT, "two nodes"): direct}
        for ours, direct in ((1.0, 2.0), (3.0, 12.0), (8.0, 10.0))
    ]
    assert quick.medians(rounds, [row]) == {"cross_node.throughput": 0.5}
    assert quick.medians([{}], [row]) == {}


def test_the_gate_fails_on_a_collapse_and_on_a_missing_ratio() -> None:
    good = {key: 2 * floor for key, floor in quick.FLOORS.items()}
    good |= {key: ceiling / 2 for key, ceiling in quick.CEILINGS.items()}
    assert quick.collapsed(good) == []
    for key, floor in quick.FLOORS.items():
        assert quick.collapsed(good | {key: floor / 2})
        assert quick.collapsed({other: good[other] for other in good if other != key})
    for key, ceiling in quick.CEILINGS.items():
        assert quick.collapsed(good | {key: ceiling * 2})


def _sample(number: int, figure: float) -> rig.Sample:
    return rig.Sample("up", "meshbpf", "cross-node", number, figure, {}, 0.0, 0.0)
