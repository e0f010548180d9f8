"""The environment of ztunnel's manifests carries over, and says where each value came from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from meshbpf.agent.config_keys import BY_NAME
from meshbpf.agent.config_sources import resolve
from meshbpf.agent.config_ztunnel import ALIASES
from meshbpf.agent.core.errors import ConfigError

pytestmark = pytest.mark.compat

DOCS = Path(__file__).parents[2] / "docs" / "configuration.md"


@pytest.mark.parametrize(
    ("name", "text", "key", "value"),
    [
        ("NODE_NAME", "node-7", "node", "node-7"),
        ("NETWORK", "net-a", "network", "net-a"),
        ("CLUSTER_DOMAIN", "example.org", "cluster-domain", "example.org"),
        ("LOCAL_XDS_PATH", "/etc/mesh.yaml", "local-xds", Path("/etc/mesh.yaml")),
        ("CLUSTER_ID", "east", "cluster-id", "east"),
        ("XDS_ADDRESS", "https://istiod:15012", "xds", "https://istiod:15012"),
        ("XDS_ROOT_CA", "/etc/root.pem", "xds-root", "/etc/root.pem"),
        ("ALT_XDS_HOSTNAME", "istiod.svc", "xds-name", "istiod.svc"),
        ("CA_ADDRESS", "https://istiod:15012", "ca", "https://istiod:15012"),
        ("CA_ROOT_CA", "SYSTEM", "ca-root", "SYSTEM"),
        ("ALT_CA_HOSTNAME", "istiod.svc", "ca-name", "istiod.svc"),
        ("AUTH_TOKEN", "/var/run/token", "token-file", Path("/var/run/token")),
        ("SECRET_TTL", "24h", "cert-ttl", 86400.0),
        ("SECRET_TTL", "1h30m0s", "cert-ttl", 5400.0),
        ("CRL_PATH", "/etc/crl.pem", "crl-dir", Path("/etc/crl.pem")),
        ("XDS_ADDRESS", "istiod:15012", "xds", "https://istiod:15012"),
        ("CA_ADDRESS", "istiod:15012", "ca", "https://istiod:15012"),
        ("KEEPALIVE_ENABLED", "false", "keepalive", False),
        ("KEEPALIVE_TIME", "1m", "keepalive-time", 60.0),
        ("KEEPALIVE_INTERVAL", "20s", "keepalive-interval", 20.0),
        ("KEEPALIVE_RETRIES", "4", "keepalive-retries", 4),
        ("USER_TIMEOUT_ENABLED", "true", "user-timeout", True),
        ("HTTP2_STREAM_WINDOW_SIZE", "1048576", "stream-window", 1048576),
        ("HTTP2_CONNECTION_WINDOW_SIZE", "8388608", "tunnel-window", 8388608),
        ("POOL_MAX_STREAMS_PER_CONNECTION", "7", "tunnel-streams", 7),
        ("POOL_UNUSED_RELEASE_TIMEOUT", "90s", "tunnel-idle", 90.0),
        ("CONNECTION_TERMINATION_DEADLINE", "7s", "termination-deadline", 7.0),
        ("ISTIO_META_DNS_CAPTURE", "true", "dns", True),
        ("LOG_FORMAT", "json", "log-format", "json"),
        ("RUST_LOG", "debug", "log-level", "debug"),
        ("RUST_LOG", "access=info,warn", "log-level", "warning"),
    ],
)
def test_a_variable_of_ztunnels_is_the_setting_that_means_the_same(
    name: str, text: str, key: str, value: object
) -> None:
    found = resolve({}, {name: text, "MESHBPF_CONFIG": ""}, None).values[key]
    assert (found.value, found.origin) == (value, f"env {name}")


@pytest.mark.parametrize(("seconds", "left"), [("30", 25.0), ("11", 6.0), ("10", 9.0), ("1", 0.0)])
def test_the_grace_period_leaves_time_to_end_by_ourselves(seconds: str, left: float) -> None:
    found = resolve({}, {"TERMINATION_GRACE_PERIOD_SECONDS": seconds}).values
    assert found["termination-deadline"].value == left


def test_the_deadline_outweighs_the_grace_period_and_our_own_name_outweighs_both() -> None:
    theirs = {
        "TERMINATION_GRACE_PERIOD_SECONDS": "30",
        "CONNECTION_TERMINATION_DEADLINE": "7s",
    }
    assert resolve({}, theirs).values["termination-deadline"].value == 7.0
    ours = theirs | {"MESHBPF_TERMINATION_DEADLINE": "3s"}
    assert resolve({}, ours).values["termination-deadline"].origin == (
        "env MESHBPF_TERMINATION_DEADLINE"
    )


def test_a_variable_comes_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("network: of-the-file\nlease: 5m\n")
    found = resolve({}, {"NETWORK": "of-the-manifest"}, file).values
    assert found["network"].value == "of-the-manifest"
    assert found["lease"].value == 300.0


def test_an_empty_variable_and_a_level_with_scopes_alone_say_nothing() -> None:
    found = resolve({}, {"NETWORK": "", "RUST_LOG": "ztunnel::proxy=trace"}).values
    assert (found["network"].origin, found["log-level"].origin) == ("default", "default")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("SECRET_TTL", "soon"),
        ("LOG_FORMAT", "xml"),
        ("AUTH_TOKEN", "eyJhbGciOi"),
        ("CA_ROOT_CA", "-----BEGIN CERTIFICATE-----"),
        ("ISTIO_META_DNS_CAPTURE", "yes"),
        ("TERMINATION_GRACE_PERIOD_SECONDS", "30s"),
        ("KEEPALIVE_RETRIES", "-1"),
        ("HTTP2_STREAM_WINDOW_SIZE", "4M"),
    ],
)
def test_a_wrong_value_is_refused_with_the_variables_name(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"env {name}: "):
        resolve({}, {name: text})


def test_the_documentation_has_every_variable_with_its_setting() -> None:
    rows = dict(re.findall(r"^\| `([A-Z0-9_]+)` \| `([a-z-]+)`", DOCS.read_text(), re.MULTILINE))
    assert rows == {alias.environment: alias.key for alias in ALIASES}
    assert set(rows.values()) <= BY_NAME.keys()
