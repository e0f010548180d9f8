"""How an error leaves the command: on stderr, in the form that was asked for.

A person gets `meshbpf: what failed` and `  hint: what to do`; with `-o json` or
`-o yaml` a program gets the same as an object. A mistake of the user never
shows a traceback; a mistake of ours (any other exception) always does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

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
    for argument, after in zip_longest(arguments, arguments[1:], fillvalue=""):
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
    """An error of the command-line parser as one of ours.

    In our words where click's differ between its versions; what an option's type says
    of a value stays.
    """
    if not isinstance(error, click.UsageError):
        return MeshbpfError("failed", error.format_message())
    hint = f"see `{error.ctx.command_path} --help`" if error.ctx is not None else ""
    if isinstance(error, click.NoSuchOption):
        what = f"no option {error.option_name}"
        known = [] if error.ctx is None else _option_names(error.ctx)
        hint = did_you_mean(error.option_name, known) or hint
    elif isinstance(error, click.MissingParameter):
        what = f"{_names(error.param)} is missing"
    elif isinstance(error, click.BadParameter):
        what = f"{_names(error.param)}: {error.message}"
    else:
        what = error.message[:1].lower() + error.message[1:]
    return CommandUsageError("usage", what.rstrip("."), hint)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint that names what is spelled nearly as `name`; empty if nothing is."""
    import difflib  # costs more than most commands take, and only mistakes need it

    near = difflib.get_close_matches(name, list(known), n=3)
    return f"did you mean {' or '.join(near)}?" if near else ""


def _option_names(ctx: click.Context) -> list[str]:
    return [name for param in ctx.command.get_params(ctx) for name in param.opts]


def _names(param: click.Parameter | None) -> str:
    if isinstance(param, click.Option):
        return "/".join(param.opts)
    return "argument" if param is None else param.human_readable_name


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
