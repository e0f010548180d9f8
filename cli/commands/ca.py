"""`meshbpf ca`: make, import and show the embedded CA."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import click

from meshbpf.agent import ca_files
from meshbpf.agent.api import CaInfo, CertificateInfo
from meshbpf.agent.config import is_object_name
from meshbpf.cli.failure import CommandUsageError
from meshbpf.cli.lazy import Group
from meshbpf.cli.options import Session, common_options, pass_session
from meshbpf.cli.output import emit, note
from meshbpf.cli.table import Cell, CellLike, Style, facts, table
from meshbpf.cli.units import moment, until

# Whether it can be read is said by the code that reads it, with the right exit status.
_FILE = click.Path(path_type=Path, readable=False)
_WIDE = 0o077


@click.group("ca", cls=Group, short_help="Create, import or show the embedded CA.")
@common_options
def command() -> None:
    """Create, import or show the embedded CA.

    Its folder holds root-cert.pem, ca-cert.pem and ca-key.pem. Agents that are given
    the same folder, or copies of it, trust each other's pods.
    """


@command.command("init", short_help="Make a new CA in a folder.")
@click.argument("directory", metavar="DIR", type=_FILE)
@click.option(
    "--trust-domain",
    metavar="TD",
    default="cluster.local",
    show_default=True,
    help="Trust domain that the CA stands for.",
)
@common_options
@pass_session
def init(session: Session, directory: Path, trust_domain: str) -> None:
    """Make a new CA in DIR: an ECDSA P-256 key and a certificate for ten years.

    DIR is made when it is missing, and refused when it holds a CA.
    """
    if not is_object_name(trust_domain):
        raise CommandUsageError(
            "bad-trust-domain",
            f"--trust-domain: {trust_domain!r} cannot be used",
            "write it as a DNS name in lower case",
        )
    _show(session, ca_files.init(directory, trust_domain, session.now()))
    note(f"CA made; {directory / ca_files.KEY} is its only secret: keep it 0600, and a copy safe")


@command.command("import", short_help="Copy a CA made elsewhere into a folder.")
@click.argument("directory", metavar="DIR", type=_FILE)
@click.option(
    "--cert", required=True, type=_FILE, metavar="F", help="The issuing certificate, PEM."
)
@click.option("--key", required=True, type=_FILE, metavar="F", help="Its private key, PEM.")
@click.option(
    "--chain", type=_FILE, metavar="F", help="Intermediates and root, unless --cert is the root."
)
@common_options
@pass_session
def import_(session: Session, directory: Path, cert: Path, key: Path, chain: Path | None) -> None:
    """Copy a CA made elsewhere into DIR, after checking that it can issue.

    The issuing certificate comes first in --cert; certificates that follow it there, or
    in --chain, lead to a self-signed root, which becomes the trust bundle.
    """
    _show(session, ca_files.import_files(directory, cert, key, chain))
    if key.stat().st_mode & _WIDE:
        note(f"{key} can be read by others; the copy in {directory} cannot")


@command.command("show", short_help="Show the CA of a folder, without its key.")
@click.argument("directory", metavar="DIR", type=_FILE)
@common_options
@pass_session
def show(session: Session, directory: Path) -> None:
    """Show the CA of DIR, after the checks that the agent would make."""
    _show(session, ca_files.show(directory))


def _show(session: Session, info: CaInfo) -> None:
    emit(session.output, "Ca", info, lambda: view(info, session.now()))


def view(info: CaInfo, now: datetime) -> str:
    """The folder, then one certificate a line from the issuing one to the roots."""
    head = facts([("folder", info.directory), ("trust domain", info.trust_domain)])
    certificates = [
        ("issuer", info.issuer),
        *(("intermediate", certificate) for certificate in info.intermediates),
        *(("root", certificate) for certificate in info.roots),
    ]
    rows = table(
        ("ROLE", "SUBJECT", "KEY", "SERIAL", "NOT AFTER", "EXPIRES", "SHA-256"),
        (_row(role, certificate, now) for role, certificate in certificates),
    )
    return f"{head}\n\n{rows}"


def _row(role: str, certificate: CertificateInfo, now: datetime) -> tuple[CellLike, ...]:
    over = certificate.not_after <= now
    return (
        role,
        certificate.subject,
        certificate.key,
        certificate.serial,
        moment(certificate.not_after),
        Cell(until(certificate.not_after, now), Style.BAD if over else Style.PLAIN),
        certificate.sha256,
    )
