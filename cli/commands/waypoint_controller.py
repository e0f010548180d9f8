"""`meshbpf waypoint-controller`: runs the waypoints that Gateways of a cluster ask for."""

from __future__ import annotations

import json
import socket
from typing import Any

import click

from meshbpf.agent.config import OptionError
from meshbpf.agent.controller_config import ControllerSettings, Template
from meshbpf.cli import cluster_options as options
from meshbpf.cli.failure import CommandUsageError
from meshbpf.cli.options import Session, common_options, pass_session


@click.command("waypoint-controller", short_help="Run the waypoints that Gateways ask for.")
@click.option("--image", required=True, metavar="IMAGE", help="Of meshbpf, for the waypoints.")
@click.option(
    "--ca",
    required=True,
    metavar="CA",
    help="Who signs for waypoints: https://HOST:PORT of istiod, or kubernetes-csr:SIGNER.",
)
@options.CA_NAME
@click.option(
    "--roots-config-map",
    default="istio-ca-root-cert",
    show_default=True,
    metavar="NAME",
    help="With root-cert.pem, in each waypoint's namespace: what the CA is checked by.",
)
@click.option(
    "--role",
    default="",
    metavar="NAME",
    help="ClusterRole of the waypoints, and the ClusterRoleBinding kept for their accounts.",
)
@click.option(
    "--namespace",
    default="meshbpf-system",
    show_default=True,
    metavar="NS",
    help="Of the Lease by which one of several replicas leads.",
)
@click.option(
    "--identity", default="", metavar="NAME", help="Of this replica.  [default: the host's name]"
)
@options.KUBECONFIG
@click.option(
    "--cluster-id",
    default="Kubernetes",
    show_default=True,
    metavar="ID",
    help="istiod's name for the cluster.",
)
@click.option(
    "--trust-domain",
    default="cluster.local",
    show_default=True,
    metavar="TD",
    help="Of the waypoints.",
)
@options.CLUSTER_DOMAIN
@click.option(
    "--root-namespace",
    default="istio-system",
    show_default=True,
    metavar="NS",
    help="Its policies for the GatewayClass hold at every waypoint.",
)
@click.option("--network", default="", metavar="NAME", help="Of the waypoints.")
@click.option(
    "--pull-policy",
    type=click.Choice(["Always", "IfNotPresent", "Never"]),
    default="IfNotPresent",
    show_default=True,
    help="When a node fetches the image.",
)
@click.option(
    "--pull-secret",
    "pull_secrets",
    multiple=True,
    metavar="NAME",
    help="For the image, in each waypoint's namespace; may be repeated.",
)
@click.option(
    "--resources",
    default="{}",
    metavar="JSON",
    help="Requests and limits of a waypoint's container.",
)
@options.READINESS
@click.option(
    "--log-level",
    type=options.LOG_LEVELS,
    default="info",
    show_default=True,
    help="Least severe lines that are logged, here and by the waypoints.",
)
@options.LOG_FORMAT
@common_options
@pass_session
def command(session: Session, /, **given: Any) -> int:
    """Run a waypoint for every Gateway of class meshbpf-waypoint, until SIGTERM or SIGINT.

    For each it keeps a ServiceAccount, a Service and a Deployment, which go with the Gateway, and
    writes the Gateway's addresses once a pod is ready; routes and policies of its services get
    conditions that say whether they are in force, and why not. Of several replicas one leads.
    """
    own = ("namespace", "role", "kubeconfig", "readiness_port", "log_level", "log_format")
    settings = {name: given.pop(name) for name in own}
    settings["identity"] = given.pop("identity") or socket.gethostname()
    given["resources"] = _resources(given["resources"])
    try:
        template = Template(**given, log_level=settings["log_level"])
        checked = ControllerSettings(**settings, template=template)
    except OptionError as error:
        raise CommandUsageError(error.code, error.what, error.hint) from error
    # Only this command pays for trio, TLS and the routes.
    from meshbpf.agent.runtime.controller.app import run

    return run(checked)


def _resources(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise _bad_resources(text) from error
    if not isinstance(found, dict):
        raise _bad_resources(text)
    return found


def _bad_resources(text: str) -> CommandUsageError:
    hint = 'write an object, for instance {"requests": {"cpu": "100m"}}'
    return CommandUsageError("bad-resources", f"--resources: {text!r} is no JSON object", hint)
