"""`meshbpf pods`: the pods that the agent steers."""

from __future__ import annotations

import click

from meshbpf.agent.api import PodsRequest, PodsResult
from meshbpf.cli.client import ask
from meshbpf.cli.options import Session, common_options, only_namespace_option, pass_session
from meshbpf.cli.output import emit
from meshbpf.cli.table import good_if, table


@click.command("pods", short_help="List the pods that the agent steers.")
@only_namespace_option
@common_options
@pass_session
def command(session: Session, namespace: str | None) -> None:
    """List the pods that the agent steers, or tries to."""
    result = ask(session, PodsRequest())
    if namespace is not None:
        result = PodsResult(pods=tuple(p for p in result.pods if p.namespace == namespace))
    emit(session.output, "Pods", result, lambda: view(result))


def view(result: PodsResult) -> str:
    """One pod a line; a failed one says why at the end of its line."""
    return table(
        ("POD", "STATE", "ADDRESSES", "IDENTITY", "AGENT DOWN", "CONNECTIONS", "REASON"),
        (
            (
                pod.pod,
                good_if(pod.state == "attached", pod.state),
                ",".join(pod.addresses),
                pod.identity,
                pod.on_agent_down,
                pod.connections,
                pod.reason,
            )
            for pod in result.pods
        ),
    )
