"""Series: what they count, when they go, what they cost."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from meshbpf.agent.core.errors import ConfigError
from meshbpf.agent.core.state import MeshState
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.traffic import Reporter, ResponseFlag
from meshbpf.agent.runtime.exposition import Family, Kind, label_text, render, wants_openmetrics
from meshbpf.agent.runtime.telemetry import Telemetry
from meshbpf.agent.runtime.traffic_metrics import TrafficMetrics, check_allowed
from tests.unit.telemetry import samples

GOLDEN = Path(__file__).parent / "golden"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def exposed(metrics: TrafficMetrics, openmetrics: bool = False) -> str:
    return "".join(render(family, openmetrics=openmetrics) for family in metrics.families())


def series_of(families: Sequence[Family], name: str) -> dict[str, int | float]:
    (family,) = [one for one in families if one.name == name]
    return dict(family.samples)


def a_day(metrics: TrafficMetrics) -> None:
    """One connection that ends well, one that policy denies, one that still lives."""
    done, denied, living = samples.outbound(1), samples.inbound(2), samples.plaintext(3)
    for live in (done, denied, living):
        metrics.opened(live, live.labels())
    done.sent.total, done.received.total = 10, 300
    living.sent.total = 7
    metrics.closed(done, done.labels(), ResponseFlag.NONE)
    metrics.closed(denied, denied.labels(), ResponseFlag.DENY)


@pytest.mark.compat
@pytest.mark.parametrize("form", ["text", "openmetrics"])
def test_the_exposition_is_as_it_was_read(form: str) -> None:
    metrics = TrafficMetrics(Clock())
    a_day(metrics)
    text = exposed(metrics, openmetrics=form == "openmetrics")
    path = GOLDEN / f"metrics-{form}.txt"
    if os.environ.get("MESHBPF_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.compat
def test_received_bytes_are_the_requests_and_sent_bytes_the_responses_on_both_sides() -> None:
    for live in (samples.outbound(), samples.inbound()):
        metrics = TrafficMetrics(Clock())
        metrics.opened(live, live.labels())
        live.sent.total, live.received.total = 10, 300  # to the destination, and back
        families = metrics.families()
        assert set(series_of(families, "istio_tcp_received_bytes").values()) == {10}
        assert set(series_of(families, "istio_tcp_sent_bytes").values()) == {300}


@pytest.mark.compat
def test_a_failure_counts_as_closed_and_failed_under_its_flag_and_opened_without() -> None:
    metrics = TrafficMetrics(Clock())
    a_day(metrics)
    families = metrics.families()
    (failed,) = series_of(families, "istio_tcp_connections_failed")
    assert 'response_flags="DENY"' in failed
    assert failed in series_of(families, "istio_tcp_connections_closed")
    assert failed not in series_of(families, "istio_tcp_connections_opened")


@pytest.mark.compat
def test_open_sockets_go_up_and_down_by_reporter() -> None:
    metrics = TrafficMetrics(Clock())
    for _ in range(3):
        metrics.socket_opened(Reporter.SOURCE)
    metrics.socket_closed(Reporter.SOURCE)
    assert series_of(metrics.families(), "istio_tcp_sockets_open") == {
        '{reporter="source"}': 2,
        '{reporter="destination"}': 0,
    }


def test_a_series_goes_after_its_grace_when_its_workload_is_gone() -> None:
    clock = Clock()
    metrics = TrafficMetrics(clock, grace_s=60)
    live = samples.outbound()
    metrics.opened(live, live.labels())
    here, gone = (lambda _owner: True), (lambda _owner: False)
    clock.now += 1000
    assert metrics.expire(gone, gone) == 0, "a live connection keeps its series"
    metrics.closed(live, live.labels(), ResponseFlag.NONE)
    assert metrics.expire(gone, gone) == 0, "the last scrape must see the end"
    clock.now += 61
    assert metrics.expire(here, here) == 0
    assert metrics.idle()
    assert metrics.expire(gone, here) == 1
    assert series_of(metrics.families(), "istio_tcp_connections_opened") == {}
    metrics.opened(live, live.labels())
    assert list(series_of(metrics.families(), "istio_tcp_connections_opened").values()) == [1]


def test_labels_that_are_not_allowed_are_left_out_and_series_become_one() -> None:
    allowed = check_allowed(["reporter", "destination_service", "response_flags"])
    metrics = TrafficMetrics(Clock(), allowed=allowed)
    a_day(metrics)
    found = series_of(metrics.families(), "istio_tcp_connections_opened")
    assert found == {
        '{reporter="source",destination_service="db.stock.svc.cluster.local",'
        'response_flags="-"}': 1,
        '{reporter="destination",destination_service="db.stock.svc.cluster.local",'
        'response_flags="-"}': 1,
        '{reporter="destination",destination_service="unknown",response_flags="-"}': 1,
    }


def test_a_label_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'pod' is not a label"):
        check_allowed(["reporter", "pod"])


def test_more_series_than_allowed_are_counted_together() -> None:
    metrics = TrafficMetrics(Clock(), max_series=1)
    a_day(metrics)
    found = series_of(metrics.families(), "istio_tcp_connections_opened")
    assert sum(found.values()) == 3
    assert series_of(metrics.families(), "meshbpf_metrics_series_overflowed")[""] > 0


def test_top_flows_count_live_bytes_too() -> None:
    metrics = TrafficMetrics(Clock())
    a_day(metrics)
    first, *_ = metrics.top_flows(2)
    assert (first.source, first.destination) == ("shop/web", "stock/db")
    assert (first.bytes_sent, first.bytes_received) == (10, 300)
    assert len(metrics.top_flows(1)) == 1


def test_a_hostile_label_value_cannot_forge_a_sample() -> None:
    text = label_text(("a",), ('x"} 1\nforged 2\\',))
    assert text == '{a="x\\"} 1\\nforged 2\\\\"}'


@pytest.mark.compat
@pytest.mark.parametrize(
    ("accept", "openmetrics"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text; version=1.0.0; charset=utf-8,text/plain;q=0.5", True),
        ("application/openmetrics-text;q=0.3,text/plain;q=0.5", False),
        ("application/openmetrics-text;q=0,text/plain", False),
        ("APPLICATION/OpenMetrics-Text", True),
    ],
)
def test_openmetrics_is_for_who_accepts_it(accept: str, openmetrics: bool) -> None:
    assert wants_openmetrics(accept) is openmetrics


def test_a_connection_costs_less_than_20_microseconds() -> None:
    metrics = TrafficMetrics(time.monotonic)
    lives = [samples.outbound(number) for number in range(2000)]

    def spent_s() -> float:
        began = time.process_time()
        for live in lives:
            metrics.opened(live, live.labels())
            metrics.closed(live, live.labels(), ResponseFlag.NONE)
        return (time.process_time() - began) / len(lives)

    gc.disable()
    try:
        assert min(spent_s() for _ in range(5)) < 20e-6
    finally:
        gc.enable()


def test_a_family_without_samples_still_says_what_it_is() -> None:
    family = Family("a", "what", Kind.COUNTER, ())
    assert render(family, openmetrics=False) == "# HELP a_total what.\n# TYPE a_total counter\n"
    assert render(family, openmetrics=True) == "# HELP a what.\n# TYPE a counter\n"


async def test_a_series_stays_while_any_workload_of_the_mesh_has_its_labels() -> None:
    clock = Clock()
    telemetry = Telemetry(grace_s=10, monotonic=clock)
    live = samples.outbound()
    telemetry.opened(live)
    telemetry.closed(live)
    clock.now += 11
    local = [samples.WEB]
    assert await telemetry.expire(samples.SNAPSHOT, local) == 0
    # A pod of the same deployment took its place.
    later = replace(samples.DB, uid="other", name="db-1")
    assert await telemetry.expire(Snapshot.of(MeshState((samples.WEB, later))), local) == 0
    assert await telemetry.expire(Snapshot.of(MeshState((samples.WEB,))), local) == 1


async def test_a_series_goes_when_its_local_workload_has_left_the_node() -> None:
    clock = Clock()
    telemetry = Telemetry(grace_s=10, monotonic=clock)
    live = samples.inbound()
    telemetry.opened(live)
    telemetry.closed(live)
    clock.now += 11
    assert await telemetry.expire(samples.SNAPSHOT, [samples.DB]) == 0
    assert await telemetry.expire(samples.SNAPSHOT, [samples.WEB]) == 1
