"""Man pages of every command, written from the command line's own definitions.

    python -m meshbpf.cli.manpages DIR

One page a command, `meshbpf.8`, `meshbpf-attach.8`, `meshbpf-ca-init.8` and so
on, in man(7) macros. Nothing is said here that `--help` does not say, but for
what holds for all commands: exit statuses, files, environment.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from meshbpf import __version__
from meshbpf.cli.main import PROGRAM, cli

_EXITS = (
    (0, "Done; for status: the agent is ready."),
    (1, "Failed; for status: the agent runs and is not ready."),
    (2, "Wrong usage."),
    (69, "No agent answers."),
    (77, "Not permitted: not root, or the control socket is another user's."),
    (78, "Wrong configuration: a file or option cannot be used."),
    (79, "check found problems."),
)


def main(directory: Path) -> None:
    """Write all pages into `directory`, which is made when missing."""
    directory.mkdir(parents=True, exist_ok=True)
    root = click.Context(cli, info_name=PROGRAM)
    for ctx in _walk(root):
        name = ctx.command_path.replace(" ", "-")
        (directory / f"{name}.8").write_text("\n".join(page(ctx)) + "\n")


def page(ctx: click.Context) -> Iterator[str]:
    """The lines of one command's page."""
    name = ctx.command_path.replace(" ", "-")
    summary = ctx.command.short_help or (ctx.command.help or "").partition("\n")[0]
    yield f'.TH {_quoted(name.upper())} 8 "" "meshbpf {__version__}" "meshbpf"'
    yield ".SH NAME"
    yield f"{_text(name)} \\- {_text(summary.rstrip('.'))}"
    yield ".SH SYNOPSIS"
    yield f".B {_text(ctx.command_path)}"
    yield _text(" ".join(ctx.command.collect_usage_pieces(ctx)))
    yield ".SH DESCRIPTION"
    for paragraph in (ctx.command.help or "").strip().split("\n\n"):
        yield ".PP"
        yield _text(" ".join(paragraph.split()))
    yield ".SH OPTIONS"
    for param in ctx.command.get_params(ctx):
        record = param.get_help_record(ctx)
        if isinstance(param, click.Option) and record is not None:
            yield ".TP"
            yield f".B {_text(record[0])}"
            yield _text(" ".join(record[1].split()))
    if isinstance(ctx.command, click.Group):
        yield ".SH COMMANDS"
        for child in _children(ctx):
            yield ".TP"
            yield f".B {_text(child.info_name or '')}"
            yield _text(child.command.short_help or "")
    yield ".SH EXIT STATUS"
    for status, meaning in _EXITS:
        yield ".TP"
        yield f".B {status}"
        yield _text(meaning)
    yield ".SH FILES"
    yield ".TP"
    yield ".I /var/lib/meshbpf/control.sock"
    yield "The agent's control socket, in its state directory."
    yield ".TP"
    yield ".I /etc/meshbpf/config.yaml"
    yield "Settings of the agent: meshbpf config view shows them."
    yield ".SH ENVIRONMENT"
    yield ".TP"
    yield ".B MESHBPF_STATE_DIR"
    yield "State directory of the agent, where no option names it."
    yield ".TP"
    yield ".B MESHBPF_CONFIG"
    yield "Configuration file, where no option names it."
    yield ".TP"
    yield ".B NO_COLOR"
    yield "When set and not empty, no output is coloured."


def _walk(ctx: click.Context) -> Iterator[click.Context]:
    yield ctx
    for child in _children(ctx):
        yield from _walk(child)


def _children(ctx: click.Context) -> Iterator[click.Context]:
    group = ctx.command
    if isinstance(group, click.Group):
        for name in group.list_commands(ctx):
            command = group.get_command(ctx, name)
            if command is not None:
                yield click.Context(command, info_name=name, parent=ctx)


def _text(text: str) -> str:
    """Text as roff reads it: hyphens of options stay hyphens, no line is a request."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + escaped if escaped.startswith((".", "'")) else escaped


def _quoted(text: str) -> str:
    return f'"{text}"'


if __name__ == "__main__":
    main(Path(sys.argv[1]))
