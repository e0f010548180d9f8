"""DNS metrics with ztunnel's names, labels and buckets."""

from __future__ import annotations

import pytest

from meshbpf.agent.runtime.dns_metrics import DnsMetrics, Transport
from meshbpf.agent.runtime.exposition import render
from tests.unit.core.builders import pod

pytestmark = pytest.mark.compat

WEB = pod("web", canonical_name="web", canonical_revision="v1")
LABELS = (
    'request_query_type="a",request_protocol="udp",'
    'source_canonical_service="web",source_canonical_revision="v1"'
)


def text(metrics: DnsMetrics) -> str:
    return "".join(render(family, openmetrics=True) for family in metrics.families())


def test_questions_forwarded_ones_and_failures_are_counted_by_type_protocol_and_source() -> None:
    metrics = DnsMetrics()
    metrics.asked(WEB, 1, Transport.UDP)
    metrics.asked(WEB, 1, Transport.UDP)
    with metrics.forwarded(WEB, 1, Transport.UDP) as outcome:
        outcome.failed()
    told = text(metrics)
    assert f"istio_dns_requests_total{{{LABELS}}} 2\n" in told
    assert f"istio_dns_upstream_requests_total{{{LABELS}}} 1\n" in told
    assert f"istio_dns_upstream_failures_total{{{LABELS}}} 1\n" in told
    name = "istio_dns_upstream_request_duration_seconds"
    bounds = ["0.0005", "0.001", "0.01", "0.1", "1.0", "5.0", "+Inf"]
    for bound in bounds:
        assert f'{name}_bucket{{{LABELS},le="{bound}"}}' in told
    assert f'{name}_bucket{{{LABELS},le="+Inf"}} 1\n' in told
    assert f"{name}_count{{{LABELS}}} 1\n" in told


def test_types_without_a_name_share_a_series_and_an_unknown_source_is_told_so() -> None:
    metrics = DnsMetrics()
    for kind in range(60000, 60100):
        metrics.asked(None, kind, Transport.TCP)
    assert text(metrics).count("istio_dns_requests_total{") == 1
    assert 'source_canonical_service="unknown"' in text(metrics)


def test_series_end_with_their_pod() -> None:
    metrics = DnsMetrics()
    metrics.asked(WEB, 1, Transport.UDP)
    metrics.asked(None, 1, Transport.UDP)
    assert metrics.expire([WEB]) == 0
    assert metrics.expire([]) == 1
    assert "web" not in text(metrics)
