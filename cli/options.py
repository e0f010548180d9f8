"""Options that every command takes, before the verb or after it, and pod names.

`meshbpf --state-dir D status -o json` and `meshbpf -o json status --state-dir D`
are the same command: the group and each command declare both options, and
each writes what it was given into one `Session`; the later one wins.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click

from meshbpf.agent.config import (
    DEFAULT_STATE_DIR,
    Exemptions,
    IPNetwork,
    parse_cidrs,
    parse_duration_s,
    parse_ports,
)
from meshbpf.agent.config_place import client_state_dir
from meshbpf.agent.core.errors import ConfigError, MeshbpfError, PrivilegeError
from meshbpf.cli.failure import CommandUsageError
from meshbpf.cli.output import Format

COMPLETION_VARIABLE = "_MESHBPF_COMPLETE"
"""What a shell sets to ask this command for completions, by click's rule."""

COMPLETION_TIMEOUT_S = 0.5  # a person waits for it with the finger on the key

F = TypeVar("F", bound=Callable[..., Any])

# Kubernetes names: a namespace is a DNS label, a pod's name a DNS subdomain.
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_POD_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")


def _utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(slots=True)
class Session:
    """What one invocation was told about where to ask and how to answer."""

    state_dir: Path = field(default_factory=lambda: client_state_dir(os.environ))
    state_dir_given: bool = False
    """By --state-dir, not by the environment, the configuration file or the default."""
    output: Format = Format.TABLE
    now: Callable[[], datetime] = field(default=_utc_now)


pass_session = click.make_pass_decorator(Session, ensure=True)


def _remember(
    attribute: str, parse: Callable[[str], object]
) -> Callable[[click.Context, click.Parameter, str | None], None]:
    def callback(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
        if value is not None:
            session = ctx.ensure_object(Session)
            setattr(session, attribute, parse(value))
            if attribute == "state_dir":
                session.state_dir_given = True

    return callback


def common_options(function: F) -> F:
    """Give a command `--state-dir` and `-o`; it reads them from its Session."""
    function = click.option(
        "-o",
        "--output",
        type=click.Choice([form.value for form in Format], case_sensitive=False),
        default=None,
        expose_value=False,
        callback=_remember("output", Format),
        help="Form of the output.  [default: table]",
    )(function)
    return click.option(
        "--state-dir",
        # Whether it may be read is the agent's or its client's to say, with status 77.
        type=click.Path(readable=False),
        metavar="DIR",
        default=None,
        expose_value=False,
        callback=_remember("state_dir", Path),
        help=f"State directory of the agent.  [default: {DEFAULT_STATE_DIR}]",
    )(function)


def pod_key(text: str, namespace: str | None) -> str:
    """The NS/NAME that `text` means: NS/NAME itself, NAME with -n NS, or NAME.NS.

    A dot is part of the name when `namespace` is given (pod names may have dots,
    namespaces may not). Raises CommandUsageError.
    """
    if "/" in text:
        found, _, name = text.partition("/")
        if namespace is not None and namespace != found:
            raise CommandUsageError(
                "two-namespaces",
                f"pod {text!r} and -n {namespace!r} name two namespaces",
                "give the namespace once",
            )
    elif namespace is not None:
        found, name = namespace, text
    else:
        name, dot, found = text.rpartition(".")
        if not dot:
            raise CommandUsageError(
                "no-namespace", f"pod {text!r} has no namespace", f"write NS/{text} or add -n NS"
            )
    if not _NAMESPACE.fullmatch(found):
        raise CommandUsageError(
            "bad-pod-name",
            f"pod {text!r}: {found!r} is not a namespace name",
            "a namespace has lower-case letters, digits and '-' only: NS/NAME, NAME.NS or -n NS",
        )
    if not _POD_NAME.fullmatch(name):
        raise CommandUsageError(
            "bad-pod-name",
            f"pod {text!r}: {name!r} is not a pod name",
            "a pod name has lower-case letters, digits, '-' and '.' only",
        )
    return f"{found}/{name}"


ON_AGENT_DOWN = click.Choice(["closed", "open"])
SAME_NODE = click.Choice(["kernel", "hbone"])


def known_pods(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Completions of a pod's name, from the agent; none while no agent answers."""
    from meshbpf.agent.api import PodsRequest, WorkloadsRequest
    from meshbpf.agent.api_client import call

    state_dir = ctx.ensure_object(Session).state_dir
    try:
        if ctx.info_name == "attach":
            mesh = call(state_dir, WorkloadsRequest(), timeout_s=COMPLETION_TIMEOUT_S)
            names = [f"{one.namespace}/{one.name}" for one in mesh.workloads]
        else:
            steered = call(state_dir, PodsRequest(), timeout_s=COMPLETION_TIMEOUT_S)
            names = [pod.pod for pod in steered.pods]
    except MeshbpfError:
        # A shell that completes has no place for messages: offering nothing is the answer.
        return []
    return [name for name in names if name.startswith(incomplete) and name.isprintable()]


def pod_option(function: F) -> F:
    """`--pod`: required, and to be read with `pod_key`."""
    return click.option(
        "--pod",
        required=True,
        metavar="NS/NAME",
        shell_complete=known_pods,
        help="The pod; also NAME.NS, or NAME with -n NS.",
    )(function)


def namespace_option(function: F) -> F:
    """`-n NS` beside a pod's NAME."""
    return click.option(
        "-n", "--namespace", metavar="NS", help="Namespace of the pod, when --pod is a bare NAME."
    )(function)


def only_namespace_option(function: F) -> F:
    """`-n NS` of a list: show this namespace only."""
    return click.option(
        "-n", "--namespace", metavar="NS", help="Show this namespace only.  [default: all]"
    )(function)


class Parsed(click.ParamType[Any]):
    """An option's text read by a parser that raises ConfigError."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self.parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The parsed value; click may hand in a value that is parsed already."""
        if not isinstance(value, str):
            return value
        try:
            return self.parse(value)
        except ConfigError as error:
            self.fail(f"{error.what}; {error.hint}", param, ctx)


DURATION = Parsed("duration", parse_duration_s)


def exemption_options(function: F) -> F:
    """What the steering leaves alone: options for `exemptions()`, each may be repeated."""
    for option in (
        click.option(
            "--exempt-interface",
            "exempt_interfaces",
            multiple=True,
            metavar="NAME",
            help="Leave this interface of the pod alone; may be repeated.",
        ),
        click.option(
            "--exempt-cidr",
            "exempt_cidrs",
            type=Parsed("cidr", lambda text: parse_cidrs([text])),
            multiple=True,
            metavar="CIDR",
            help="Leave connections to and from these addresses alone; may be repeated.",
        ),
        click.option(
            "--exempt-port",
            "exempt_ports",
            type=Parsed("port", lambda text: parse_ports([text])),
            multiple=True,
            metavar="PORT[-PORT]",
            help="Leave connections to these ports alone, in both directions; may be repeated.",
        ),
    ):
        function = option(function)
    return function


def exemptions(
    ports: tuple[frozenset[int], ...],
    cidrs: tuple[tuple[IPNetwork, ...], ...],
    interfaces: tuple[str, ...],
) -> Exemptions:
    """The values of `exemption_options` as one."""
    return Exemptions(
        ports=frozenset().union(*ports),
        cidrs=tuple(dict.fromkeys(cidr for part in cidrs for cidr in part)),
        interfaces=frozenset(interfaces),
    )


def require_root(verb: str) -> None:
    """Raise PrivilegeError unless this process has root's user id."""
    if os.geteuid() != 0:
        raise PrivilegeError(
            "not-root",
            f"`meshbpf {verb}` needs root, and runs as uid {os.geteuid()}",
            f"run it with sudo: sudo meshbpf {verb} ...",
        )
