"""Settings and the small parsers beside them."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path

import pytest

from meshbpf.agent.config import (
    PodName,
    Settings,
    parse_cidrs,
    parse_duration_s,
    parse_ports,
)
from meshbpf.agent.core.errors import ConfigError

BASE = {"node": "n", "state_dir": Path("s"), "ca_dir": Path("c"), "local_xds": Path("x")}


def test_each_value_knows_its_origin() -> None:
    settings = Settings.from_flags({**BASE, "lease_s": 5.0})
    assert settings.lease_s == 5.0
    assert settings.origins["lease_s"] == "flag"
    assert settings.origins["capture"] == "default"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("node", ""),
        ("node", "a b"),
        ("trust_domain", "Not/One"),
        ("capture", "iptables"),
        ("on_agent_down", "ajar"),
        ("cert_ttl_s", 0.5),
        ("cert_ttl_s", float("nan")),
        ("lease_s", -1.0),
        ("heartbeat_limit_s", 0.1),
        ("readiness_port", 0),
        ("otlp", "otel:4318"),
        ("log_level", "loud"),
        ("log_format", "xml"),
    ],
)
def test_a_wrong_value_cannot_exist(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field.removesuffix("_s").replace("_", "-")):
        Settings.from_flags({**BASE, field: value})


@pytest.mark.parametrize(
    ("text", "seconds"), [("500ms", 0.5), ("30s", 30), ("5m", 300), ("24h", 86400), ("1.5", 1.5)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == seconds


def test_a_waypoint_cannot_be_required_of_a_proxy_that_does_not_enforce_it() -> None:
    with pytest.raises(ConfigError, match="require-waypoint") as found:
        Settings(node="n", state_dir=Path("/s"), proxy="ztunnel", require_waypoint=True)
    assert "ztunnel" in found.value.hint


@pytest.mark.parametrize("text", ["", "s", "-1s", "1y", "1 s 2", "inf"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a duration"):
        parse_duration_s(text)


def test_ports_come_single_in_ranges_and_with_commas() -> None:
    assert parse_ports(["22", "80,8000-8002"]) == {22, 80, 8000, 8001, 8002}
    assert parse_ports([]) == frozenset()


@pytest.mark.parametrize("text", ["", "0", "65536", "x", "9-8", "1-", "-1", "1,"])
def test_what_is_no_port_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a port"):
        parse_ports([text])


def test_networks_are_sorted_and_single() -> None:
    assert parse_cidrs(["fd00::/8,10.1.0.0/16", "10.0.0.0/8", "10.1.0.0/16"]) == (
        ip_network("10.0.0.0/8"),
        ip_network("10.1.0.0/16"),
        ip_network("fd00::/8"),
    )


def test_a_network_with_host_bits_is_refused() -> None:
    with pytest.raises(ConfigError, match="has host bits set"):
        parse_cidrs(["10.0.0.1/8"])


def test_a_pod_name_is_namespace_and_name() -> None:
    assert PodName.parse("web/a-0.x") == PodName("web", "a-0.x")
    assert str(PodName("web", "a")) == "web/a"


@pytest.mark.parametrize("text", ["", "a", "/a", "a/", "a/b/c", "A/b", "../x", "a/..", "a/b\n"])
def test_what_is_no_pod_name_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a pod name"):
        PodName.parse(text)
