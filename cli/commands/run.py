"""`meshbpf run`: the node agent itself, in the foreground."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from meshbpf.agent.config import Settings
from meshbpf.agent.core.errors import ConfigError
from meshbpf.cli.failure import CommandUsageError
from meshbpf.cli.options import (
    DURATION,
    ON_AGENT_DOWN,
    Session,
    common_options,
    exemption_options,
    exemptions,
    pass_session,
)

# Whether it can be read is said by the code that reads it, with the right exit status.
_FILE = click.Path(path_type=Path, readable=False)


@click.command("run", short_help="Run the node agent.")
@click.option("--node", required=True, metavar="NAME", help="This node's name in the mesh state.")
@click.option(
    "--ca-dir",
    type=_FILE,
    required=True,
    metavar="DIR",
    help="The embedded CA's folder: see `meshbpf ca init`.",
)
@click.option(
    "--local-xds",
    type=_FILE,
    required=True,
    metavar="FILE",
    help="Mesh state in ztunnel's LOCAL_XDS YAML; read again when it changes.",
)
@click.option("--trust-domain", metavar="TD", help="[default: cluster.local]")
@click.option("--network", metavar="NAME", help="This node's network.  [default: empty]")
@click.option(
    "--capture",
    type=click.Choice(["auto", "tc"]),
    help="auto: connect hook with TC beneath where the kernel can; tc: TC alone.  [default: auto]",
)
@click.option(
    "--on-agent-down",
    type=ON_AGENT_DOWN,
    help="What attached pods do while no agent runs: refuse new connections, or let them go "
    "round the mesh.  [default: closed]",
)
@exemption_options
@click.option(
    "--probe-cgroup",
    "probe_cgroups",
    type=_FILE,
    multiple=True,
    metavar="DIR",
    help="Connections from this cgroup v2 folder are health probes; may be repeated.",
)
@click.option(
    "--cert-ttl",
    "cert_ttl_s",
    type=DURATION,
    metavar="TIME",
    help="Life of a workload certificate, renewed at its half.  [default: 24h]",
)
@click.option(
    "--lease",
    "lease_s",
    type=DURATION,
    metavar="TIME",
    help="How long 'not in the mesh' is believed without an agent.  [default: 60s]",
)
@click.option(
    "--heartbeat-limit",
    "heartbeat_limit_s",
    type=DURATION,
    metavar="TIME",
    help="Silence after which the kernel takes the agent for dead.  [default: 500ms]",
)
@click.option(
    "--readiness-port",
    type=click.IntRange(1, 65_535),
    metavar="PORT",
    help="Port of GET /healthz/ready.  [default: 15021]",
)
@click.option(
    "--cri-socket",
    type=_FILE,
    metavar="SOCKET",
    help="Socket of the container runtime, which finds pods by name.  [default: the first of "
    "containerd's, k3s's, CRI-O's and cri-dockerd's that is there]",
)
@click.option(
    "--account-wait",
    "account_wait_s",
    type=DURATION,
    metavar="TIME",
    help="How long an attach by name waits for the mesh state to name the pod.  [default: 5s]",
)
@click.option(
    "--admin-port",
    type=click.IntRange(0, 65_535),
    metavar="PORT",
    help="Port of the admin page, on loopback; 0 is none.  [default: 15000]",
)
@click.option(
    "--admin-open",
    is_flag=True,
    default=None,
    help="Let anyone who reaches the admin port use it, not root alone.",
)
@click.option(
    "--stats-port",
    type=click.IntRange(0, 65_535),
    metavar="PORT",
    help="Port of GET /metrics; 0 is none.  [default: 15020]",
)
@click.option(
    "--metric-label",
    "metric_labels",
    multiple=True,
    metavar="NAME",
    help="Keep this label of istio_tcp_* metrics and drop those not named; may be repeated.",
)
@click.option(
    "--metrics-grace",
    "metrics_grace_s",
    type=DURATION,
    metavar="TIME",
    help="How long metrics outlive their workload.  [default: 5m]",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="[default: info]",
)
@click.option("--log-format", type=click.Choice(["plain", "json"]), help="[default: plain]")
@common_options
@pass_session
def command(
    session: Session,
    /,
    exempt_ports: Any,
    exempt_cidrs: Any,
    exempt_interfaces: Any,
    **given: Any,
) -> int:
    """Run the node agent in the foreground, until SIGTERM or SIGINT.

    The state directory is made (0700) and locked; pods attached before are taken over
    again. Logs go to stderr. Ready means: the log says so, `meshbpf status` exits 0, and
    GET /healthz/ready answers 200.
    """
    flags = {name: value for name, value in given.items() if value not in (None, ())}
    exempt = exemptions(exempt_ports, exempt_cidrs, exempt_interfaces)
    if exempt_ports or exempt_cidrs or exempt_interfaces:
        flags["exempt"] = exempt
    try:
        settings = Settings.from_flags({**flags, "state_dir": session.state_dir})
    except ConfigError as error:
        # Each value came from this command line: the fault is in the usage.
        raise CommandUsageError(error.code, error.what, error.hint) from error
    # Only this command pays for trio, OpenSSL and the loader.
    from meshbpf.agent.runtime.app import run

    status: int = run(settings)
    return status
