"""`meshbpf connections`: what the agent carries now."""

from __future__ import annotations

from typing import Literal

import click

from meshbpf.agent.api import ConnectionInfo, ConnectionsRequest, ConnectionsResult
from meshbpf.cli.client import ask
from meshbpf.cli.options import (
    Session,
    common_options,
    known_pods,
    only_namespace_option,
    pass_session,
    pod_key,
)
from meshbpf.cli.output import emit, note
from meshbpf.cli.table import Cell, CellLike, table
from meshbpf.cli.units import duration, size


@click.command("connections", short_help="List the connections that the agent carries.")
@click.option("--pod", metavar="NS/NAME", shell_complete=known_pods, help="Only those of this pod.")
@only_namespace_option
@click.option("--direction", type=click.Choice(["outbound", "inbound"]), help="Only this way.")
@click.option(
    "--limit",
    type=click.IntRange(1, 1_000_000),
    default=10_000,
    show_default=True,
    help="Show this many at most, the agent's first.",
)
@common_options
@pass_session
def command(
    session: Session,
    pod: str | None,
    namespace: str | None,
    direction: Literal["outbound", "inbound"] | None,
    limit: int,
) -> None:
    """List the connections that are carried now: the agent's, oldest first, then the kernel's."""
    request = ConnectionsRequest(
        pod=None if pod is None else pod_key(pod, namespace), direction=direction, limit=limit
    )
    result = ask(session, request)
    if pod is None and namespace is not None:
        found = tuple(c for c in result.connections if c.pod.startswith(f"{namespace}/"))
        result = ConnectionsResult(connections=found, total=result.total)
    emit(session.output, "Connections", result, lambda: view(result))
    if len(result.connections) < result.total and namespace is None:
        note(f"{len(result.connections)} of {result.total} connections shown: see --limit")


def view(result: ConnectionsResult) -> str:
    """One connection a line; UPSTREAM is what the agent dialed, if it carries it.

    AGENT is there while a predecessor drains: its process id.
    """
    replaced = any(connection.agent for connection in result.connections)
    return table(
        (
            *(("AGENT",) if replaced else ()),
            "DIRECTION",
            "POD",
            "SOURCE",
            "DESTINATION",
            "SERVICE",
            "PROTOCOL",
            "UPSTREAM",
            "PEER",
            "SENT",
            "RECEIVED",
            "AGE",
        ),
        (
            (*((str(connection.agent or "-"),) if replaced else ()), *_row(connection))
            for connection in result.connections
        ),
    )


def _row(connection: ConnectionInfo) -> tuple[CellLike, ...]:
    return (
        connection.direction,
        connection.pod,
        connection.source,
        connection.destination,
        connection.service,
        connection.protocol if connection.path == "agent" else f"{connection.protocol} (kernel)",
        connection.upstream,
        connection.peer_identity,
        Cell(size(connection.bytes_sent), right=True),
        Cell(size(connection.bytes_received), right=True),
        Cell(duration(connection.age_s), right=True),
    )
