"""One reply, three forms: a table for people, JSON and YAML for programs.

The structs of `meshbpf.agent.api` are the schema of all of them: JSON and
YAML are the struct as it is, with `apiVersion` and `kind` in front; the table
is a view of the same struct. Data goes to stdout and nothing else does:
narration (`note`) and errors go to stderr.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any

import click

from meshbpf.cli.escape import printable

if TYPE_CHECKING:
    import msgspec

# msgspec, json, PyYAML and the schema are imported where they are used: `--help` and
# completion need none of them.


class Format(Enum):
    """What `-o` takes."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


def document(kind: str, body: msgspec.Struct) -> dict[str, Any]:
    """The machine form of a reply: what JSON and YAML both print."""
    import msgspec

    from meshbpf.agent.api import API_VERSION

    return {"apiVersion": API_VERSION, "kind": kind, **msgspec.to_builtins(body)}


def emit(form: Format, kind: str, body: msgspec.Struct, view: Callable[[], str]) -> None:
    """Print `body` in the asked form; `view` makes the table and runs only if that is asked."""
    click.echo(view() if form is Format.TABLE else machine(form, document(kind, body)))


def machine(form: Format, content: dict[str, Any]) -> str:
    """`content` as JSON or YAML text without a final newline.

    Everything outside ASCII is escaped: both formats would let terminal controls of
    the C1 range and bidirectional overrides through.
    """
    if form is Format.JSON:
        import json

        return json.dumps(content, indent=2, ensure_ascii=True)
    import yaml

    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    dumped = yaml.dump(content, Dumper=dumper, sort_keys=False, allow_unicode=False)
    return str(dumped).rstrip("\n")


def note(message: str) -> None:
    """One line of narration, on stderr, so that stdout stays data."""
    click.echo(printable(message), err=True)
