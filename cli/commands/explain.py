"""`meshbpf explain`: which way a connection takes, and why."""

from __future__ import annotations

import click

from meshbpf.agent.api import ExplainRequest, ExplainResult
from meshbpf.cli.client import ask
from meshbpf.cli.failure import CommandUsageError
from meshbpf.cli.options import Session, common_options, pass_session
from meshbpf.cli.output import emit
from meshbpf.cli.table import line

_OUTCOMES = {
    "kernel": "carried by the kernel, between two pods of this node",
    "hbone": "carried by the agent, through a tunnel with mutual TLS",
    "plaintext": "goes in the clear",
    "refused": "is refused",
    "denied": "is denied by policy",
}


@click.command("explain", short_help="Say which way a connection takes, and why.")
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST[:PORT]")
@click.option("--method", default="GET", show_default=True, help="Of a request to a waypoint.")
@click.option("--path", default="/", show_default=True, help="Its path, with the query.")
@click.option(
    "--header",
    "headers",
    multiple=True,
    metavar="NAME:VALUE",
    help="A header of it; may be repeated.",
)
@common_options
@pass_session
def command(
    session: Session,
    source: str,
    destination: str,
    method: str,
    path: str,
    headers: tuple[str, ...],
) -> None:
    """Say which way a connection from SRC to DST takes, and why.

    SRC is NS/NAME or an address of a workload. DST is an address, a pod (NS/NAME) or a
    host name as SRC would write it. The agent answers from the mesh state in force, by the
    functions that decide real connections, and for its own pods from the kernel's maps. Of
    several endpoints it draws one, as a connection does. Where the connection goes through a
    waypoint, and the agent knows its routes (--manifests), the request of --method, --path
    and --header is followed: which filters speak, which rule matches, which backend is asked.
    """
    request = ExplainRequest(
        source=source,
        destination=destination,
        method=method,
        path=path,
        headers=dict(map(_header, headers)),
    )
    result = ask(session, request)
    emit(session.output, "Explain", result, lambda: view(result))


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise CommandUsageError(
            "bad-header", f"--header {text!r} has no name", "write --header NAME:VALUE"
        )
    return name.strip(), value.strip()


def view(result: ExplainResult) -> str:
    """A line for each step, and the outcome at the end."""
    width = max(len(step.stage) for step in result.steps)
    lines = []
    for step in result.steps:
        lines.append(line(f"{step.stage:<{width}}  {step.what}"))
        if step.why:
            lines.append(line(f"{'':<{width}}    {step.why}"))
    lines.append(line(f"{'=> it':<{width}}  {_OUTCOMES[result.outcome]}"))
    return "\n".join(lines)
