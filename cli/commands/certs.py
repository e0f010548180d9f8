"""`meshbpf certs`: the certificates that the agent holds."""

from __future__ import annotations

from datetime import datetime

import click

from meshbpf.agent.api import CertInfo, CertsRequest, CertsResult
from meshbpf.cli.client import ask
from meshbpf.cli.options import Session, common_options, pass_session
from meshbpf.cli.output import emit
from meshbpf.cli.table import Cell, CellLike, Style, line, table
from meshbpf.cli.units import moment, until

_STYLES = {
    "valid": Style.GOOD,
    "pending": Style.WARN,
    "renewing": Style.WARN,
    "failed": Style.BAD,
    "expired": Style.BAD,
}


@click.command("certs", short_help="List the certificates that the agent holds.")
@common_options
@pass_session
def command(session: Session) -> None:
    """List the certificates that the agent holds for the pods of this node.

    Private keys stay in the agent's memory and are never shown.
    """
    result = ask(session, CertsRequest())
    emit(session.output, "Certs", result, lambda: view(result, session.now()))


def view(result: CertsResult, now: datetime) -> str:
    """One identity a line, why a certificate failed, and the roots that certificates lead to."""
    blocks = [
        table(
            ("IDENTITY", "STATE", "SERIAL", "NOT AFTER", "EXPIRES", "PODS"),
            (_row(cert, now) for cert in result.certs),
        )
    ]
    blocks += [
        line(f"{cert.identity}: {cert.error.what}")
        for cert in result.certs
        if cert.error is not None
    ]
    if result.roots:
        rows = ((root, str(_leading_to(result, root))) for root in result.roots)
        blocks.append(table(("TRUSTED ROOT (SHA-256)", "CERTIFICATES"), rows))
    if lost := _leading_to(result, ""):
        blocks.append(line(f"{lost} lead to none of the trusted roots: peers will refuse them"))
    return "\n\n".join(blocks)


def _leading_to(result: CertsResult, root: str) -> int:
    return sum(cert.serial != "" and cert.root == root for cert in result.certs)


def _row(cert: CertInfo, now: datetime) -> tuple[CellLike, ...]:
    return (
        cert.identity,
        Cell(cert.state, _STYLES[cert.state]),
        cert.serial,
        moment(cert.not_after),
        "" if cert.not_after is None else until(cert.not_after, now),
        ",".join(cert.pods),
    )
