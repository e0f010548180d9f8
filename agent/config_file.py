"""The configuration file: YAML whose top-level keys are settings of `run`.

Every refusal names file and line. Kept apart from the other sources because
it alone needs YAML.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from meshbpf.agent.config_keys import BY_NAME, Value, misplaced
from meshbpf.agent.core.errors import ConfigError
from meshbpf.agent.core.yaml_tree import Mapping, Node, Scalar, Sequence, read_yaml

MAX_FILE_BYTES = 1024 * 1024


def read_file(path: Path) -> dict[str, Value]:
    """The values of a configuration file by key. Raises ConfigError, with the line."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            "no-config", f"configuration {path}: {error.strerror}", "name another with --config"
        ) from error
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError("bad-config", f"configuration {path} has more than a megabyte")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError("bad-yaml", f"{path}:{line}: not UTF-8") from None
    if all(not line.strip() or line.lstrip().startswith("#") for line in text.splitlines()):
        return {}  # nothing but comments, as the file of the package
    tree = read_yaml(text, str(path))
    if not isinstance(tree, Mapping):
        raise ConfigError(
            "bad-config", f"{path}:{tree.line}: the file is no mapping", "write KEY: VALUE lines"
        )
    return _read_tree(path, tree)


def _read_tree(path: Path, tree: Mapping) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for name, node in tree.entries:
        origin = f"{path}:{name.line}"
        key = BY_NAME.get(name.text)
        if key is None:
            near = get_close_matches(name.text, BY_NAME, n=1)
            raise ConfigError(
                "unknown-key",
                f"{origin}: no setting {name.text!r}",
                f"did you mean {near[0]!r}?" if near else "`meshbpf config view` shows all",
            )
        if name.text in values:
            raise ConfigError("double-key", f"{origin}: {name.text} is given twice")
        try:
            values[key.name] = Value(key.check(_plain(node)), origin)
        except ConfigError as error:
            raise misplaced(origin, key.name, error) from None
    return values


def _plain(node: Node) -> Any:
    """A tree's node as the values that YAML 1.2 has for it."""
    if isinstance(node, Mapping):
        return {key.text: _plain(value) for key, value in node.entries}
    if isinstance(node, Sequence):
        return [_plain(item) for item in node.items]
    return _scalar(node)


def _scalar(node: Scalar) -> Any:
    text = node.text
    if not node.plain:
        return text
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    for number in (int, float):
        # Python takes 1_000 for a number and YAML does not.
        if text.isascii() and "_" not in text and text[-1].isdigit():
            try:
                return number(text)
            except ValueError:
                continue
    return text
