"""`meshbpf attach`: steer a pod's connections through the agent."""

from __future__ import annotations

import click

from meshbpf.agent.api import AttachRequest, AttachResult, OnAgentDownName, SameNodeName
from meshbpf.agent.config import IPNetwork
from meshbpf.cli.client import change
from meshbpf.cli.failure import CommandUsageError
from meshbpf.cli.options import (
    ON_AGENT_DOWN,
    SAME_NODE,
    Session,
    common_options,
    exemption_options,
    exemptions,
    namespace_option,
    pass_session,
    pod_key,
    pod_option,
)
from meshbpf.cli.output import emit
from meshbpf.cli.table import EMPTY, line


@click.command("attach", short_help="Steer a pod's connections through the agent.")
@pod_option
@namespace_option
@click.option(
    "--netns",
    metavar="NAME_OR_PATH",
    help="The pod's network namespace: a name under /run/netns, or a path.  "
    "[default: what the container runtime says]",
)
@click.option(
    "--pid", type=click.IntRange(1), metavar="PID", help="In place of --netns: a process in it."
)
@click.option(
    "--container",
    metavar="ID",
    help="In place of --netns: a container in it, by its id or at least 12 digits of it.",
)
@click.option(
    "--service-account",
    metavar="SA",
    help="Service account of the pod.  [default: what the mesh state says]",
)
@click.option("--on-agent-down", type=ON_AGENT_DOWN, help="Overrides the agent's default.")
@click.option(
    "--dns/--no-dns",
    default=None,
    help="Answer its DNS queries from the mesh state.  [default: as the agent was told]",
)
@click.option("--same-node", type=SAME_NODE, help="Overrides the agent's default.")
@exemption_options
@common_options
@pass_session
def command(
    session: Session,
    pod: str,
    namespace: str | None,
    netns: str | None,
    pid: int | None,
    container: str | None,
    service_account: str | None,
    on_agent_down: OnAgentDownName | None,
    dns: bool | None,
    same_node: SameNodeName | None,
    exempt_ports: tuple[frozenset[int], ...],
    exempt_cidrs: tuple[tuple[IPNetwork, ...], ...],
    exempt_interfaces: tuple[str, ...],
) -> None:
    """Steer a pod's TCP connections through the agent.

    The agent asks the node's container runtime (CRI) for the pod, and attaches it again
    when it is recreated under its name. With --netns, --pid or --container no runtime is
    asked, and the pod is forgotten once that namespace is gone.

    New connections are captured from the moment this returns; established ones go
    on untouched. Attaching again changes the options and is otherwise harmless.
    Exemptions given here replace those of the agent's own options.
    """
    if sum(place is not None for place in (netns, pid, container)) > 1:
        raise CommandUsageError(
            "two-places",
            "the pod's network namespace is named in more than one way",
            "give one of --netns, --pid and --container, or none of them",
        )
    exempt = exemptions(exempt_ports, exempt_cidrs, exempt_interfaces)
    request = AttachRequest(
        pod=pod_key(pod, namespace),
        netns=netns,
        pid=pid,
        container=container,
        service_account=service_account,
        on_agent_down=on_agent_down,
        dns=dns,
        same_node=same_node,
        exempt_ports=tuple(sorted(exempt.ports)) or None,
        exempt_cidrs=tuple(map(str, exempt.cidrs)) or None,
        exempt_interfaces=tuple(sorted(exempt.interfaces)) or None,
    )
    result = change(session, request)
    emit(session.output, "Attach", result, lambda: view(result))


def view(result: AttachResult) -> str:
    """One line: what happened, and as whom the pod speaks now."""
    pod = result.pod
    addresses = ", ".join(pod.addresses) or "no address yet"
    verb = "is attached already" if result.outcome == "unchanged" else result.outcome
    return line(f"pod {pod.pod} {verb}: {addresses} as {pod.identity or EMPTY}")
