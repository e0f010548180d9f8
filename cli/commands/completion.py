"""`meshbpf completion`: the script that makes a shell complete this command."""

from __future__ import annotations

import click
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

from meshbpf.cli.options import COMPLETION_VARIABLE, common_options

SCRIPTS: dict[str, type[ShellComplete]] = {
    "bash": BashComplete,
    "zsh": ZshComplete,
    "fish": FishComplete,
}


@click.command("completion", short_help="Print a shell's completion script.")
@click.argument("shell", type=click.Choice(list(SCRIPTS)))
@common_options
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    For bash: meshbpf completion bash > /etc/bash_completion.d/meshbpf. The script runs
    the command itself, which completes verbs and options without importing them, and
    names of pods by asking the agent.
    """
    script = SCRIPTS[shell](ctx.find_root().command, {}, "meshbpf", COMPLETION_VARIABLE)
    # Not .source(), which runs bash to look at its version.
    click.echo(script.source_template % script.source_vars())
