"""`meshbpf cni`: the plugin that enrols pods before they start, in and out of a node."""

from __future__ import annotations

from pathlib import Path

import click

from meshbpf.agent import cni_install
from meshbpf.agent.api import CNI_SOCKET
from meshbpf.agent.cni_install import BIN_DIR, NET_DIR, PACKAGED, Place
from meshbpf.agent.core.errors import ConfigError
from meshbpf.cli.lazy import Group
from meshbpf.cli.options import Session, common_options, pass_session
from meshbpf.cli.output import note

_DIRECTORY = click.Path(path_type=Path, file_okay=False)
_FILE = click.Path(path_type=Path, readable=False)


@click.group("cni", cls=Group, short_help="Chain the CNI plugin into this node, or take it out.")
@common_options
def command() -> None:
    """Chain the CNI plugin into this node's network configuration, or take it out.

    The plugin asks the agent for each pod that starts: what the labels enrol is captured
    before its first process runs, and does not start while no agent answers.
    """


def _place(function: click.decorators.FC) -> click.decorators.FC:
    for option in (
        click.option(
            "--bin-dir",
            type=_DIRECTORY,
            default=BIN_DIR,
            show_default=True,
            metavar="DIR",
            help="Where the runtime finds plugins.",
        ),
        click.option(
            "--net-dir",
            type=_DIRECTORY,
            default=NET_DIR,
            show_default=True,
            metavar="DIR",
            help="Where the runtime finds network configurations.",
        ),
    ):
        function = option(function)
    return function


@command.command("install", short_help="Chain the plugin, or update it.")
@_place
@click.option(
    "--binary",
    type=_FILE,
    default=PACKAGED,
    show_default=True,
    metavar="FILE",
    help="The plugin.",
)
@click.option(
    "--exclude-namespace",
    "exclude",
    multiple=True,
    metavar="NS",
    help="Pods of this namespace start without the question, also while no agent answers; "
    "may be repeated.  [default: kube-system]",
)
@common_options
@pass_session
def install(
    session: Session, net_dir: Path, bin_dir: Path, binary: Path, exclude: tuple[str, ...]
) -> None:
    """Chain the plugin into the network configuration that the runtime reads.

    Files are replaced whole. May be repeated: the entry is then brought up to date.
    """
    if not binary.is_file():
        raise ConfigError(
            "no-plugin", f"{binary} is not there", "build it with `make cni`, name it by --binary"
        )
    socket = session.state_dir.absolute() / CNI_SOCKET
    chosen = exclude or ("kube-system",)
    path = cni_install.install(Place(net_dir, bin_dir), binary, socket, chosen)
    note(f"chained in {path}; it asks the agent at {socket}")


@command.command("uninstall", short_help="Take the plugin out of the configuration.")
@_place
@common_options
def uninstall(net_dir: Path, bin_dir: Path) -> None:
    """Take the plugin out of every network configuration, then remove it.

    Pods that it enrolled stay captured until they end, or `meshbpf detach` lifts it.
    """
    changed = cni_install.uninstall(Place(net_dir, bin_dir))
    note("\n".join(f"changed or removed {path}" for path in changed) or "it was not chained")
