"""`meshbpf`: the command.

Only the table of commands lives here; each command is a module of
`meshbpf.cli.commands` that is imported when it runs. `main` is the one place
where an error becomes a message and an exit status.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence

import click

from meshbpf import __version__
from meshbpf.agent.core.errors import Exit, MeshbpfError
from meshbpf.cli.failure import asked_format, from_click, report
from meshbpf.cli.lazy import Entry, LazyGroup
from meshbpf.cli.options import COMPLETION_VARIABLE, common_options

PROGRAM = "meshbpf"
_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
_BROKEN_PIPE = 141  # 128 + SIGPIPE: the reader of our output went away
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


def _entry(name: str, summary: str) -> tuple[str, Entry]:
    return name, Entry(f"meshbpf.cli.commands.{name.replace('-', '_')}", summary)


COMMANDS = dict(
    [
        _entry("run", "Run the node agent."),
        _entry("waypoint", "Run a waypoint: routes and policy for HTTP."),
        _entry("waypoint-controller", "Run the waypoints that Gateways ask for."),
        _entry("reload", "Replace the running agent, and break no connection."),
        _entry("attach", "Steer a pod's connections through the agent."),
        _entry("detach", "Stop steering a pod, and leave no trace."),
        _entry("status", "Show whether the agent is ready, and why not."),
        _entry("pods", "List the pods that the agent steers."),
        _entry("workloads", "List the workloads of the mesh state."),
        _entry("services", "List the services of the mesh state."),
        _entry("policies", "List the authorization policies of the mesh state."),
        _entry("certs", "List the certificates that the agent holds."),
        _entry("connections", "List the connections that the agent carries."),
        _entry("explain", "Say which way a connection takes, and why."),
        _entry("log", "Show or change the agent's log levels."),
        _entry("check", "Say what this machine can do, and what it lacks."),
        _entry("config", "Check or show the agent's configuration."),
        _entry("ca", "Create, import or show the embedded CA."),
        _entry("cni", "Chain the CNI plugin into this node, or take it out."),
        _entry("completion", "Print a shell's completion script."),
        _entry("version", "Show the versions of the command and the agent."),
    ]
)


@click.group(
    cls=LazyGroup,
    entries=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit status: 0 done, 1 failed, 2 wrong usage, 69 no agent answers, 77 not permitted, "
    "78 wrong configuration, 79 `check` found problems.",
)
@click.version_option(__version__, message="meshbpf %(version)s")
@common_options
@click.pass_context
def cli(ctx: click.Context) -> None:
    """An Istio ambient data plane: eBPF steering and an HBONE proxy.

    Pods are named NS/NAME, NAME.NS, or NAME with -n NS. --state-dir and -o are taken
    before and after the command.
    """
    # Without either, click colours for a terminal and not for a pipe.
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        ctx.color = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A locale without Unicode shows escapes, where it would show a traceback.
            stream.reconfigure(errors="backslashreplace")
    if COMPLETION_VARIABLE in os.environ:
        cli.main(given, prog_name=PROGRAM, complete_var=COMPLETION_VARIABLE)
    try:
        # Not click's own main(), which ends with status 1 when a pipe breaks: of
        # `status` that would mean "not ready".
        with cli.make_context(PROGRAM, list(given)) as ctx:
            status = cli.invoke(ctx)
        sys.stdout.flush()
    except click.exceptions.Exit as done:  # --help and --version
        return done.exit_code
    except MeshbpfError as error:
        return report(error, asked_format(given))
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return Exit.USAGE
    except click.ClickException as error:
        return report(from_click(error), asked_format(given))
    except (click.Abort, KeyboardInterrupt):
        return _INTERRUPTED
    except BrokenPipeError:
        _forget_stdout()
        return _BROKEN_PIPE
    except OSError as error:
        if error.errno not in _FULL or error.filename is not None:
            raise  # not of stdout: a fault of ours
        _forget_stdout()
        what = f"the output cannot be written: {error.strerror}"
        return report(MeshbpfError("output", what), asked_format(given))
    return status if isinstance(status, int) else Exit.OK


def _forget_stdout() -> None:
    """Keep Python from flushing what cannot be written once more at exit, and complaining."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
