"""`meshbpf run` that must not start: the real command, its message and its exit status.

What needs a running agent beside it is in tests/netns/test_bad_input.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from meshbpf.agent.config import Settings
from meshbpf.agent.core.tuning import Keepalive, Tuning
from meshbpf.cli.main import cli
from tests.cli.conftest import as_root

RUN = (
    *("run", "--node", "n1", "--state-dir", "STATE/state"),
    *("--ca-dir", "STATE/ca", "--local-xds", "STATE/mesh.yaml"),
)
PINS = Path("/sys/fs/bpf/meshbpf")
# In namespaces of its own, so that it meets neither another agent nor the host's headers.
OWN_NETNS = ("unshare", "--net", "--")
NO_HEADERS = (
    *("unshare", "--net", "--mount", "sh", "-c"),
    'mount -t tmpfs none /usr/src && mount -t tmpfs none /lib/modules && exec "$@"',
    "sh",
)


@pytest.fixture
def ready_to_run(meshbpf: Any, tmp_path: Path) -> Path:
    """A folder with a CA and a mesh state, where nothing keeps `run` from starting."""
    assert meshbpf("ca", "init", tmp_path / "ca").status == 0
    (tmp_path / "mesh.yaml").write_text("workloads: []\n")
    return tmp_path


def no_ca(folder: Path) -> None:
    shutil.rmtree(folder / "ca")


def no_key(folder: Path) -> None:
    (folder / "ca" / "ca-key.pem").unlink()


def wide_key(folder: Path) -> None:
    (folder / "ca" / "ca-key.pem").chmod(0o644)


def no_mesh_file(folder: Path) -> None:
    (folder / "mesh.yaml").unlink()


def unknown_field(folder: Path) -> None:
    (folder / "mesh.yaml").write_text("workloads:\n- name: a\n  nonsense: 1\n")


def state_dir_is_a_file(folder: Path) -> None:
    (folder / "state").touch()


@as_root
@pytest.mark.root
@pytest.mark.parametrize(
    "spoil", [no_ca, no_key, wide_key, no_mesh_file, unknown_field, state_dir_is_a_file]
)
def test_run_says_what_keeps_it_from_starting(
    fails: Any, ready_to_run: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(ready_to_run)
    fails(f"run-{spoil.__name__.replace('_', '-')}", *RUN, prefix=OWN_NETNS)


@as_root
@pytest.mark.root
def test_run_without_kernel_headers_names_the_package(meshbpf: Any, ready_to_run: Path) -> None:
    if Path("/sys/kernel/kheaders.tar.xz").exists():
        pytest.skip("this kernel carries its headers itself")
    arguments = [word.replace("STATE", str(ready_to_run)) for word in RUN]
    try:
        ran = meshbpf(*arguments, prefix=NO_HEADERS)
    finally:
        agent_id = (ready_to_run / "state" / "agent-id").read_text().strip()
        shutil.rmtree(PINS / agent_id, ignore_errors=True)
    assert ran.status == 1
    assert "meshbpf: no kernel headers for " in ran.stderr
    assert ran.stderr.endswith("  hint: apt-get install linux-headers-amd64\n")


def settings_of(monkeypatch: pytest.MonkeyPatch, *options: str) -> Settings:
    """What `run` would start the agent with."""
    seen: list[Settings] = []

    def run(settings: Settings, predecessor: object) -> int:
        assert predecessor is None
        seen.append(settings)
        return 0

    monkeypatch.setattr("meshbpf.agent.runtime.app.run", run)
    done = CliRunner().invoke(cli, [*RUN, *options])
    assert done.exit_code == 0, done.output
    return seen[0]


def test_options_that_are_not_given_are_the_agent_s_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = settings_of(monkeypatch)
    given = {"node", "state_dir", "ca_dir", "local_xds"}
    assert {name for name, origin in settings.origins.items() if origin == "flag"} == given
    assert settings == Settings(
        node="n1",
        state_dir=Path("STATE/state"),
        ca_dir=Path("STATE/ca"),
        local_xds=Path("STATE/mesh.yaml"),
        origins=settings.origins,
    )


def test_each_option_reaches_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(
        monkeypatch,
        *("--trust-domain", "td.example", "--network", "net1", "--capture", "tc"),
        *("--on-agent-down", "open", "--exempt-port", "22", "--exempt-port", "8000-8001"),
        *("--exempt-cidr", "198.51.100.0/24", "--exempt-interface", "eth1"),
        *("--probe-cgroup", "/sys/fs/cgroup/a", "--cert-ttl", "2h", "--lease", "5m"),
        *("--heartbeat-limit", "750ms", "--readiness-port", "15121"),
        *("--log-level", "debug", "--log-format", "json"),
        *("--admin-port", "0", "--admin-open", "--stats-port", "15120"),
        *("--metric-label", "reporter", "--metrics-grace", "1m"),
        *("--otlp", "http://otel:4318"),
        "--enrol",
        *("--kubeconfig", "/etc/kube"),
        *("--xds-root", "/etc/root.pem", "--xds-name", "istiod", "--ca-root", "/etc/root.pem"),
        *("--ca-name", "istiod", "--token-file", "/etc/token", "--cluster-id", "east"),
        *("--cri-socket", "/run/cri", "--account-wait", "2s"),
        *("--no-dns", "--cluster-domain", "k8s.example"),
        *("--crl-dir", "/etc/meshbpf/crl", "--same-node", "hbone", "--pod-connections", "900"),
        *("--pod-memory", "1000000", "--require-waypoint"),
        *("--no-keepalive", "--keepalive-time", "1m", "--keepalive-interval", "20s"),
        *("--keepalive-retries", "3", "--user-timeout", "--stream-window", "65535"),
        *("--tunnel-window", "1048576", "--tunnel-streams", "7", "--tunnel-idle", "1m"),
        *("--termination-deadline", "3s", "--reload-deadline", "1h"),
        *("--zds-socket", "/run/zds", "--proxy", "meshbpf", "--pods-from", "zds:/run/z"),
    )
    assert settings.node_agent == Path("/run/z")
    assert (settings.proxy, settings.zds_socket) == ("meshbpf", Path("/run/zds"))
    assert (settings.pod_connections, settings.same_node) == (900, "hbone")
    assert (settings.termination_deadline_s, settings.reload_deadline_s) == (3.0, 3600.0)
    assert settings.pod_memory == 1000000
    assert settings.require_waypoint
    assert settings.tuning == Tuning(
        Keepalive(enabled=False, time_s=60, interval_s=20, retries=3, user_timeout=True),
        stream_window_bytes=65535,
        tunnel_window_bytes=1048576,
        tunnel_streams=7,
        tunnel_idle_s=60.0,
    )
    assert (settings.dns, settings.cluster_domain) == (False, "k8s.example")
    assert (settings.cri_socket, settings.account_wait_s) == (Path("/run/cri"), 2.0)
    # Mesh state and certificates come from one place each: the others are not given.
    others = {"manifests", "kubernetes", "xds", "ca"}
    assert {name for name, origin in settings.origins.items() if origin != "flag"} == others
    assert (settings.trust_domain, settings.network, settings.capture) == (
        "td.example",
        "net1",
        "tc",
    )
    assert settings.on_agent_down == "open"
    assert settings.exempt.ports == {22, 8000, 8001}
    assert [str(cidr) for cidr in settings.exempt.cidrs] == ["198.51.100.0/24"]
    assert settings.exempt.interfaces == {"eth1"}
    assert settings.probe_cgroups == (Path("/sys/fs/cgroup/a"),)
    assert settings.crl_dir == Path("/etc/meshbpf/crl")
    assert (settings.cert_ttl_s, settings.lease_s) == (7200.0, 300.0)
    assert (settings.heartbeat_limit_s, settings.readiness_port) == (0.75, 15121)
    assert (settings.admin_port, settings.admin_open, settings.stats_port) == (0, True, 15120)
    assert settings.otlp == "http://otel:4318"
    assert (settings.metric_labels, settings.metrics_grace_s) == (("reporter",), 60.0)
    assert (settings.log_level, settings.log_format) == ("debug", "json")


def test_a_value_that_cannot_be_used_is_wrong_usage(fails: Any) -> None:
    fails("run-trust-domain", *RUN, "--trust-domain", "Not/One")
