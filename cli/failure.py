"""How an error leaves the command: on stderr, in the form that was asked for.

A person gets `meshbpf: what failed` and `  hint: what to do`; with `-o json` or
`-o yaml` a program gets the same as an object. A mistake of the user never
shows a traceback; a mistake of ours (any other exception) always does.
"""

from __future__ import annotations

from collections.abc import Sequence

import click

from meshbpf.agent.core.errors import Exit, MeshbpfError
from meshbpf.cli.escape import printable
from meshbpf.cli.output import Format, document, machine


class CommandUsageError(MeshbpfError):
    """The command line itself is wrong: nothing was tried."""

    exit_status = Exit.USAGE


def asked_format(arguments: Sequence[str]) -> Format:
    """The format named by the last `-o` of a command line that may not have parsed."""
    form = Format.TABLE
    following = [*arguments[1:], ""]
    for argument, after in zip(arguments, following, strict=True):
        if argument in {"-o", "--output"}:
            value = after
        elif argument.startswith("--output="):
            value = argument.removeprefix("--output=")
        elif argument.startswith("-o"):
            value = argument.removeprefix("-o")
        else:
            continue
        form = next((known for known in Format if known.value == value.lower()), form)
    return form


def from_click(error: click.ClickException) -> MeshbpfError:
    """An error of the command-line parser as one of ours, with the usage as its hint."""
    what = error.format_message().rstrip(".")
    if not isinstance(error, click.UsageError):
        return MeshbpfError("failed", what)
    hint = ""
    if error.ctx is not None:
        pieces = " ".join(error.ctx.command.collect_usage_pieces(error.ctx))
        hint = f"usage: {error.ctx.command_path} {pieces}; more with --help"
    return CommandUsageError("usage", what, hint)


def report(error: MeshbpfError, form: Format) -> Exit:
    """Write `error` to stderr and return the status to end with."""
    if form is Format.TABLE:
        lines = [f"meshbpf: {_indented(error.what)}"]
        if error.hint:
            lines.append(f"  hint: {_indented(error.hint)}")
        click.echo("\n".join(lines), err=True)
    else:
        from meshbpf.agent.api import ErrorBody, Result

        class Failure(Result, frozen=True):
            error: ErrorBody

        body = ErrorBody(
            code=error.code,
            what=error.what,
            hint=error.hint,
            exit_status=int(error.exit_status),
        )
        click.echo(machine(form, document("Error", Failure(error=body))), err=True)
    return error.exit_status


def _indented(text: str) -> str:
    """`text` with its further lines indented: no part of it can pass for a line of ours."""
    return "\n    ".join(printable(line) for line in text.strip("\n").split("\n"))
