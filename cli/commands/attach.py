"""`meshbpf attach`: steer a pod's connections through the agent."""

from __future__ import annotations

import click

from meshbpf.agent.api import AttachRequest, AttachResult, OnAgentDownName
from meshbpf.agent.config import IPNetwork
from meshbpf.cli.client import change
from meshbpf.cli.options import (
    ON_AGENT_DOWN,
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
    required=True,
    metavar="NAME_OR_PATH",
    help="The pod's network namespace: a name under /run/netns, or a path.",
)
@click.option(
    "--service-account",
    metavar="SA",
    help="Service account of the pod.  [default: what the mesh state says]",
)
@click.option("--on-agent-down", type=ON_AGENT_DOWN, help="Overrides the agent's default.")
@exemption_options
@common_options
@pass_session
def command(
    session: Session,
    pod: str,
    namespace: str | None,
    netns: str,
    service_account: str | None,
    on_agent_down: OnAgentDownName | None,
    exempt_ports: tuple[frozenset[int], ...],
    exempt_cidrs: tuple[tuple[IPNetwork, ...], ...],
    exempt_interfaces: tuple[str, ...],
) -> None:
    """Steer a pod's TCP connections through the agent.

    New connections are captured from the moment this returns; established ones go
    on untouched. Attaching again changes the options and is otherwise harmless.
    Exemptions given here replace those of the agent's own options.
    """
    exempt = exemptions(exempt_ports, exempt_cidrs, exempt_interfaces)
    request = AttachRequest(
        pod=pod_key(pod, namespace),
        netns=netns,
        service_account=service_account,
        on_agent_down=on_agent_down,
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
