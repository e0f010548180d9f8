"""`meshbpf workloads`: the workloads of the mesh state."""

from __future__ import annotations

import click

from meshbpf.agent.api import WorkloadsRequest, WorkloadsResult
from meshbpf.cli.client import ask
from meshbpf.cli.options import Session, common_options, only_namespace_option, pass_session
from meshbpf.cli.output import emit
from meshbpf.cli.table import Cell, Style, table


@click.command("workloads", short_help="List the workloads of the mesh state.")
@only_namespace_option
@common_options
@pass_session
def command(session: Session, namespace: str | None) -> None:
    """List the workloads of the mesh state, on all nodes."""
    result = ask(session, WorkloadsRequest())
    if namespace is not None:
        result = WorkloadsResult(
            workloads=tuple(w for w in result.workloads if w.namespace == namespace)
        )
    emit(session.output, "Workloads", result, lambda: view(result))


def view(result: WorkloadsResult) -> str:
    """One workload a line; ATTACHED says whether this node's agent steers it."""
    return table(
        (
            "NAMESPACE",
            "NAME",
            "ADDRESSES",
            "NODE",
            "PROTOCOL",
            "STATUS",
            "ATTACHED",
            "SERVICES",
            "POLICIES",
            "IDENTITY",
        ),
        (
            (
                workload.namespace,
                workload.name,
                ",".join(workload.addresses),
                workload.node,
                workload.protocol,
                workload.status,
                Cell("yes", Style.GOOD) if workload.attached else "no",
                ",".join(workload.services),
                ",".join(workload.policies),
                workload.identity,
            )
            for workload in result.workloads
        ),
    )
