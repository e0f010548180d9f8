"""`meshbpf waypoint`: the L7 proxy of a namespace or a service, in the foreground."""

from __future__ import annotations

from typing import Any

import click

from meshbpf.agent.config import ISTIO_ROOT, ISTIO_TOKEN, STATS_PORT, OptionError
from meshbpf.agent.core.address import AddressError, IPAddress, parse_ip
from meshbpf.agent.core.workload import HBONE_PORT
from meshbpf.agent.waypoint_config import (
    DEFAULT_WAYPOINT_STATE,
    WORKERS_LIMIT,
    WaypointSettings,
)
from meshbpf.cli import cluster_options as options
from meshbpf.cli.failure import CommandUsageError
from meshbpf.cli.options import DURATION, Session, common_options, pass_session, pod_key


@click.command("waypoint", short_help="Run a waypoint: routes and policy for HTTP.")
@click.option("--name", required=True, metavar="NS/NAME", help="The Gateway that it is.")
@click.option("--ca-dir", type=options.FILE, metavar="DIR", help="The embedded CA's folder.")
@click.option(
    "--ca",
    default="",
    metavar="CA",
    help="In its place: https://HOST:PORT of istiod, or kubernetes-csr:SIGNER.",
)
@click.option(
    "--ca-root",
    default=ISTIO_ROOT,
    show_default=True,
    metavar="FILE",
    help="Roots that istiod is checked by, or SYSTEM; of a signer: its own.",
)
@options.CA_NAME
@click.option(
    "--token-file",
    type=options.FILE,
    default=ISTIO_TOKEN,
    show_default=True,
    metavar="FILE",
    help="The own account's token, by which istiod knows who asks.",
)
@click.option(
    "--cluster-id",
    default="Kubernetes",
    show_default=True,
    metavar="ID",
    help="istiod's name for the cluster that the token is from.",
)
@click.option(
    "--manifests",
    type=options.FILE,
    metavar="DIR",
    help="Kubernetes and Istio objects, as YAML; read again when they change.",
)
@click.option(
    "--kubernetes", is_flag=True, help="Objects from the Kubernetes API, by list and watch."
)
@options.KUBECONFIG
@click.option(
    "--local-xds",
    type=options.FILE,
    metavar="FILE",
    help="Mesh state in ztunnel's LOCAL_XDS YAML, which has no routes.",
)
@click.option(
    "--address",
    "addresses",
    multiple=True,
    metavar="IP",
    help="Own address, as the mesh state has it; may be repeated.",
)
@click.option(
    "--service-account", metavar="NAME", help="Own account.  [default: the Gateway's name]"
)
@click.option(
    "--workers",
    type=click.IntRange(1, WORKERS_LIMIT),
    default=1,
    show_default=True,
    help="Processes that share the port.",
)
@click.option(
    "--trust-domain", default="", metavar="TD", help="Own trust domain.  [default: the CA's]"
)
@click.option("--network", default="", metavar="NAME", help="Own network.  [default: empty]")
@options.CLUSTER_DOMAIN
@click.option(
    "--root-namespace",
    default="istio-system",
    show_default=True,
    metavar="NS",
    help="Its policies for a GatewayClass hold at every waypoint of the class.",
)
@click.option("--cert-ttl", "cert_ttl_s", type=DURATION, metavar="TIME", help="[default: 24h]")
@click.option(
    "--hbone-port",
    type=click.IntRange(1, 65_535),
    default=HBONE_PORT,
    show_default=True,
    help="Port for tunnels.",
)
@click.option(
    "--stats-port",
    type=click.IntRange(0, 65_535),
    default=STATS_PORT,
    show_default=True,
    help="Port of GET /metrics; 0 is none.",
)
@options.READINESS
@click.option(
    "--log-level",
    type=options.LOG_LEVELS,
    default="info",
    show_default=True,
    help="Least severe lines that are logged.",
)
@options.LOG_FORMAT
@click.option("--worker", type=int, hidden=True, help="Which worker this is; its parent says so.")
@common_options
@pass_session
def command(session: Session, /, **given: Any) -> int:
    """Run one waypoint in the foreground, until SIGTERM or SIGINT.

    It takes HBONE on port 15008 for the services (and pods) that are bound to it, routes and
    judges their requests, and passes them on under its own identity. It needs neither root nor
    BPF. Ready means: the log says so, and GET /healthz/ready answers 200.
    """
    namespace, _, name = pod_key(given.pop("name"), None).partition("/")
    given["addresses"] = tuple(map(_address, given["addresses"]))
    given["service_account"] = given["service_account"] or name
    state_dir = session.state_dir if session.state_dir_given else DEFAULT_WAYPOINT_STATE / name
    if given["cert_ttl_s"] is None:
        del given["cert_ttl_s"]
    try:
        settings = WaypointSettings(namespace=namespace, name=name, state_dir=state_dir, **given)
    except OptionError as error:
        raise CommandUsageError(error.code, error.what, error.hint) from error
    # Only this command pays for trio, OpenSSL and the routes.
    from meshbpf.agent.runtime.waypoint.app import run

    status: int = run(settings)
    return status


def _address(text: str) -> IPAddress:
    try:
        return parse_ip(text)
    except AddressError as error:
        raise CommandUsageError("bad-address", f"--address: {error.what}", "give an IP") from error
