"""The options of `run`, which `config` takes too: each is one setting of the agent.

None has a default here: what was not given may still come from the
environment or the configuration file (agent/config_sources.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from meshbpf.agent.config import OptionError, Settings
from meshbpf.agent.config_sources import Resolved, resolve
from meshbpf.cli.failure import CommandUsageError
from meshbpf.cli.options import DURATION, ON_AGENT_DOWN, SAME_NODE, Session, exemption_options

F = TypeVar("F")

# Whether it can be read is said by the code that reads it, with the right exit status.
_FILE = click.Path(path_type=Path, readable=False)

_OPTIONS: tuple[Any, ...] = (
    click.option(
        "--config",
        "config_file",
        type=_FILE,
        metavar="FILE",
        help="Configuration file.  [default: /etc/meshbpf/config.yaml, if it is there]",
    ),
    click.option(
        "--node",
        metavar="NAME",
        help="This node's name in the mesh state.  [default: this host's name]",
    ),
    click.option(
        "--ca-dir",
        type=_FILE,
        metavar="DIR",
        help="The embedded CA's folder: see `meshbpf ca init`.",
    ),
    click.option(
        "--local-xds",
        type=_FILE,
        metavar="FILE",
        help="Mesh state in ztunnel's LOCAL_XDS YAML; read again when it changes.",
    ),
    click.option(
        "--manifests",
        type=_FILE,
        metavar="DIR",
        help="Mesh state in Kubernetes and Istio objects, as YAML; read again when they change.",
    ),
    click.option(
        "--kubernetes",
        is_flag=True,
        default=None,
        help="Mesh state from the Kubernetes API; implies --enrol.",
    ),
    click.option(
        "--kubeconfig",
        type=_FILE,
        metavar="FILE",
        help="How to reach the API.  [default: KUBECONFIG's, else the pod's own]",
    ),
    click.option(
        "--xds",
        metavar="URL",
        help="Mesh state from istiod, for instance https://istiod.istio-system.svc:15012.",
    ),
    click.option(
        "--xds-root",
        metavar="FILE",
        help="Roots by which istiod is checked, or SYSTEM.  "
        "[default: /var/run/secrets/istio/root-cert.pem]",
    ),
    click.option(
        "--xds-name",
        metavar="HOST",
        help="What istiod's certificate is for.  [default: the host in --xds]",
    ),
    click.option(
        "--ca",
        metavar="CA",
        help="Certificates from istiod, at https://HOST:PORT, from a signer of the cluster, as "
        "kubernetes-csr:SIGNER, or from this node's SPIRE agent, as spire:SOCKET, its admin "
        "socket; instead of --ca-dir.",
    ),
    click.option(
        "--ca-root",
        metavar="FILE",
        help="Roots by which the CA is checked, or SYSTEM; those of a signer's certificates.  "
        "[default: /var/run/secrets/istio/root-cert.pem]",
    ),
    click.option(
        "--ca-name",
        metavar="HOST",
        help="What the CA's certificate is for.  [default: the host in --ca]",
    ),
    click.option(
        "--token-file",
        type=_FILE,
        metavar="FILE",
        help="The agent's service-account token, read for each request.  "
        "[default: /var/run/secrets/tokens/istio-token]",
    ),
    click.option(
        "--cluster-id",
        metavar="NAME",
        help="istiod's name for the cluster of that token.  [default: Kubernetes]",
    ),
    click.option("--trust-domain", metavar="TD", help="[default: cluster.local]"),
    click.option("--network", metavar="NAME", help="This node's network.  [default: empty]"),
    click.option(
        "--capture",
        type=click.Choice(["auto", "tc"]),
        help="auto: connect hook with TC beneath where the kernel can; tc: TC alone.  "
        "[default: auto]",
    ),
    click.option(
        "--on-agent-down",
        type=ON_AGENT_DOWN,
        help="What attached pods do while no agent runs: refuse new connections, or let them go "
        "round the mesh.  [default: closed]",
    ),
    click.option(
        "--same-node",
        type=SAME_NODE,
        help="Who carries connections between captured pods of this node that policy allows: the "
        "kernel, or HBONE through the agent.  [default: kernel]",
    ),
    click.option(
        "--proxy",
        type=click.Choice(["meshbpf", "ztunnel"]),
        help="Who serves the connections of captured pods: this agent, or a stock ztunnel that "
        "runs beside it.  [default: meshbpf]",
    ),
    click.option(
        "--zds-socket",
        type=_FILE,
        metavar="PATH",
        help="Where that ztunnel asks for pods (its INPOD_UDS).  "
        "[default: /var/run/ztunnel/ztunnel.sock]",
    ),
    click.option(
        "--pods-from",
        metavar="zds:PATH",
        help="Serve pods that Istio's node agent captures and hands over at this socket, "
        "instead of steering pods.",
    ),
    exemption_options,
    click.option(
        "--require-waypoint/--no-require-waypoint",
        default=None,
        help="Refuse whoever reaches a pod past the waypoint that it is bound to.  [default: off]",
    ),
    click.option(
        "--dns/--no-dns",
        default=None,
        help="Answer the DNS queries of pods from the mesh state, and forward the rest.  "
        "[default: --dns]",
    ),
    click.option(
        "--cluster-domain",
        metavar="DOMAIN",
        help="Below it are the names of the cluster's services.  [default: cluster.local]",
    ),
    click.option(
        "--probe-cgroup",
        "probe_cgroups",
        type=_FILE,
        multiple=True,
        metavar="DIR",
        help="Connections from this cgroup v2 folder are health probes; may be repeated.",
    ),
    click.option(
        "--cert-ttl",
        "cert_ttl_s",
        type=DURATION,
        metavar="TIME",
        help="Life of a workload certificate, renewed at its half.  [default: 24h]",
    ),
    click.option(
        "--crl-dir",
        type=_FILE,
        metavar="DIR",
        help="Certificate revocation lists, PEM or DER: a folder of them, or one file; read again "
        "when they change.",
    ),
    click.option(
        "--lease",
        "lease_s",
        type=DURATION,
        metavar="TIME",
        help="How long 'not in the mesh' is believed without an agent.  [default: 60s]",
    ),
    click.option(
        "--heartbeat-limit",
        "heartbeat_limit_s",
        type=DURATION,
        metavar="TIME",
        help="Silence after which the kernel takes the agent for dead.  [default: 500ms]",
    ),
    click.option(
        "--pod-connections",
        type=click.IntRange(0, 10_000_000),
        metavar="COUNT",
        help="How many connections a pod may have at a time; more are reset. 0: only its share "
        "once descriptors are scarce.  [default: 0]",
    ),
    click.option(
        "--pod-memory",
        type=click.IntRange(0, 2**40),
        metavar="BYTES",
        help="How many bytes of a pod's connections may wait to be read; beyond, those that hold "
        "most are reset. 0: no bound.  [default: 268435456]",
    ),
    click.option(
        "--keepalive/--no-keepalive",
        default=None,
        help="TCP keepalive on every connection that is carried.  [default: on]",
    ),
    click.option(
        "--keepalive-time",
        "keepalive_time_s",
        type=DURATION,
        metavar="TIME",
        help="Silence before the first probe.  [default: 180s]",
    ),
    click.option(
        "--keepalive-interval",
        "keepalive_interval_s",
        type=DURATION,
        metavar="TIME",
        help="Between probes.  [default: 180s]",
    ),
    click.option(
        "--keepalive-retries",
        type=click.IntRange(1, 127),
        metavar="COUNT",
        help="Probes without an answer that end a connection.  [default: 9]",
    ),
    click.option(
        "--user-timeout/--no-user-timeout",
        default=None,
        help="Also data that nobody acknowledges for so long ends it.  [default: off]",
    ),
    click.option(
        "--stream-window",
        type=click.IntRange(65_535, 2**31 - 1),
        metavar="BYTES",
        help="What a peer may send on a connection before its app reads.  [default: 4194304]",
    ),
    click.option(
        "--tunnel-window",
        type=click.IntRange(65_535, 2**31 - 1),
        metavar="BYTES",
        help="The same for all connections of a tunnel together.  [default: 16777216]",
    ),
    click.option(
        "--tunnel-streams",
        type=click.IntRange(1, 65_535),
        metavar="COUNT",
        help="Connections that share a tunnel.  [default: 100]",
    ),
    click.option(
        "--tunnel-idle",
        "tunnel_idle_s",
        type=DURATION,
        metavar="TIME",
        help="How long a tunnel without connections is kept.  [default: 5m]",
    ),
    click.option(
        "--termination-deadline",
        "termination_deadline_s",
        type=DURATION,
        metavar="TIME",
        help="How long connections may go on after SIGTERM.  [default: 5s]",
    ),
    click.option(
        "--reload-deadline",
        "reload_deadline_s",
        type=DURATION,
        metavar="TIME",
        help="How long they may go on in the agent that a reload has replaced.  [default: 15m]",
    ),
    click.option(
        "--readiness-port",
        type=click.IntRange(1, 65_535),
        metavar="PORT",
        help="Port of GET /healthz/ready.  [default: 15021]",
    ),
    click.option(
        "--cri-socket",
        type=_FILE,
        metavar="SOCKET",
        help="Socket of the container runtime, which finds pods by name.  [default: the first of "
        "containerd's, k3s's, CRI-O's and cri-dockerd's that is there]",
    ),
    click.option(
        "--account-wait",
        "account_wait_s",
        type=DURATION,
        metavar="TIME",
        help="How long an attach by name waits for the mesh state to name the pod.  [default: 5s]",
    ),
    click.option(
        "--enrol",
        is_flag=True,
        default=None,
        help="Attach this node's pods that the mesh state enrols, found by the container runtime.",
    ),
    click.option(
        "--admin-port",
        type=click.IntRange(0, 65_535),
        metavar="PORT",
        help="Port of the admin page, on loopback; 0 is none.  [default: 15000]",
    ),
    click.option(
        "--admin-open",
        is_flag=True,
        default=None,
        help="Let anyone who reaches the admin port use it, not root alone.",
    ),
    click.option(
        "--stats-port",
        type=click.IntRange(0, 65_535),
        metavar="PORT",
        help="Port of GET /metrics; 0 is none.  [default: 15020]",
    ),
    click.option(
        "--metric-label",
        "metric_labels",
        multiple=True,
        metavar="NAME",
        help="Keep this label of istio_tcp_* metrics and drop those not named; may be repeated.",
    ),
    click.option(
        "--metrics-grace",
        "metrics_grace_s",
        type=DURATION,
        metavar="TIME",
        help="How long metrics outlive their workload.  [default: 5m]",
    ),
    click.option(
        "--otlp",
        metavar="URL",
        help="Send access logs and connection spans to the OpenTelemetry collector at this "
        "http(s)://HOST:PORT, by OTLP over HTTP.  [default: off]",
    ),
    click.option(
        "--log-level",
        type=click.Choice(["debug", "info", "warning", "error"]),
        help="[default: info]",
    ),
    click.option("--log-format", type=click.Choice(["plain", "json"]), help="[default: plain]"),
)


def run_options(function: F) -> F:
    """Give a command every option of `run`; it hands what it gets to `resolved`."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def resolved(session: Session, given: Mapping[str, Any]) -> Resolved:
    """All settings, from the options that were given and from everywhere else.

    Raises ConfigError.
    """
    flags = {name: value for name, value in given.items() if value not in (None, ())}
    file = flags.pop("config_file", None)
    if "exempt_ports" in flags:
        flags["exempt_ports"] = frozenset().union(*flags["exempt_ports"])
    if "exempt_cidrs" in flags:
        cidrs = (cidr for part in flags["exempt_cidrs"] for cidr in part)
        flags["exempt_cidrs"] = tuple(dict.fromkeys(cidrs))
    if "exempt_interfaces" in flags:
        flags["exempt_interfaces"] = frozenset(flags["exempt_interfaces"])
    if session.state_dir_given:
        flags["state_dir"] = session.state_dir
    return resolve(flags, os.environ, file)


def settings_of(found: Resolved) -> Settings:
    """The settings, checked. A value of this command line that is wrong is wrong usage."""
    try:
        return found.settings()
    except OptionError as error:
        raise CommandUsageError(error.code, error.what, error.hint) from error
