"""A click group that imports a command only when that command runs.

Importing every command costs more than most of them take to run, so the group
knows its members by a table: name, where it lives, and its one-line help.
`--help`, completion and typo suggestions are answered from the table alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click
from click.shell_completion import CompletionItem

from meshbpf.cli.failure import CommandUsageError, did_you_mean


@dataclass(frozen=True, slots=True)
class Entry:
    """A command that is not imported yet: `module` holds it under the name `command`."""

    module: str
    summary: str  # must equal the command's own short help; a test holds them together


class Group(click.Group):
    """A group that answers a misspelt verb with those spelled nearly so."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, but an unknown name is compared with the known ones."""
        name = args[0]
        known = self.list_commands(ctx)
        if name in known or name.startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        hint = did_you_mean(name, known) or f"see `{ctx.command_path} --help`"
        raise CommandUsageError("no-such-command", f"no command {name!r}", hint)


class LazyGroup(Group):
    """A group whose members come from a table of `Entry`."""

    def __init__(self, *args: Any, entries: Mapping[str, Entry], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.entries = entries

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the table's order, which tells a story, unlike the alphabet's."""
        return list(self.entries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command; None if the table has no such name."""
        entry = self.entries.get(cmd_name)
        if entry is None:
            return None
        command: click.Command = importlib.import_module(entry.module).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The Commands section, from the table."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in self.entries.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names from the table, then this group's own options."""
        found = [
            CompletionItem(name, help=entry.summary)
            for name, entry in self.entries.items()
            if name.startswith(incomplete)
        ]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]
