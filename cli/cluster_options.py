"""Options that the processes of a cluster share: the waypoint and its controller."""

from __future__ import annotations

from pathlib import Path

import click

from meshbpf.agent.config import READINESS_PORT

# Whether it can be read is said by the code that reads it, with the right exit status.
FILE = click.Path(path_type=Path, readable=False)

CA_NAME = click.option(
    "--ca-name", default="", metavar="NAME", help="Of istiod's certificate.  [default: the host]"
)
KUBECONFIG = click.option(
    "--kubeconfig",
    type=FILE,
    metavar="FILE",
    help="How the API is reached.  [default: KUBECONFIG's, else the pod's own account]",
)
CLUSTER_DOMAIN = click.option(
    "--cluster-domain",
    default="cluster.local",
    show_default=True,
    metavar="DOMAIN",
    help="Below it are the names of the cluster's services.",
)
READINESS = click.option(
    "--readiness-port",
    type=click.IntRange(1, 65_535),
    default=READINESS_PORT,
    show_default=True,
    help="Port of GET /healthz/ready.",
)
LOG_FORMAT = click.option(
    "--log-format",
    type=click.Choice(["plain", "json"]),
    default="plain",
    show_default=True,
    help="Form of the log lines.",
)
LOG_LEVELS = click.Choice(["debug", "info", "warning", "error"])
