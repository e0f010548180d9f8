"""Istio's proxy configuration, where its keys mean the same as settings of ours.

ztunnel takes it from the variable PROXY_CONFIG, and beneath that from the mesh
configuration that Istio mounts, whose `defaultConfig` it is. Keys that stand
there for other proxies are passed over, as there.

Source: istio/ztunnel, src/config.rs, construct_proxy_config.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from meshbpf.agent.config_keys import BY_NAME, Value, misplaced
from meshbpf.agent.config_place import MESH_FILE
from meshbpf.agent.config_ztunnel import url
from meshbpf.agent.core.errors import ConfigError
from meshbpf.agent.core.yaml_tree import Mapping as Tree
from meshbpf.agent.core.yaml_tree import Node, Scalar, read_yaml

VARIABLE = "PROXY_CONFIG"
MAX_FILE_BYTES = 1024 * 1024

SETTINGS = {
    "discoveryAddress": "xds",
    "proxyAdminPort": "admin-port",
    "statsPort": "stats-port",
}
_METADATA = "proxyMetadata"
_META = "ISTIO_META_"


def of_variable(environ: Mapping[str, str]) -> dict[str, Value]:
    """Settings by name. Raises ConfigError naming the variable and its line."""
    return _settings(_of_variable(environ), f"env {VARIABLE}")


def of_mesh_file(path: Path = MESH_FILE) -> dict[str, Value]:
    """The same of the mesh configuration; nothing when there is none."""
    return _settings(_default_config(path), str(path))


def metadata(environ: Mapping[str, str], path: Path = MESH_FILE) -> dict[str, str]:
    """`environ` with `proxyMetadata` beneath it, for what is told to istiod of this proxy.

    Names without ISTIO_META_ are given it: both forms mean the same there.
    """
    found: dict[str, str] = {}
    for tree in (_default_config(path), _of_variable(environ)):
        for name, node in _entries(tree):
            if name == _METADATA:
                for key, value in _entries(node):
                    if isinstance(value, Scalar):
                        found[_META + key.removeprefix(_META)] = value.text
    return found | dict(environ)


def _of_variable(environ: Mapping[str, str]) -> Node | None:
    text = environ.get(VARIABLE, "")
    return read_yaml(text, f"env {VARIABLE}") if text.strip() else None


def _default_config(path: Path) -> Node | None:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError("no-config", f"mesh configuration {path}: {error.strerror}") from error
    try:
        tree = read_yaml(content[:MAX_FILE_BYTES].decode(), str(path))
    except UnicodeDecodeError:
        raise ConfigError("bad-yaml", f"mesh configuration {path} is not UTF-8") from None
    return next((node for name, node in _entries(tree) if name == "defaultConfig"), None)


def _settings(tree: Node | None, origin: str) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for name, node in _entries(tree):
        key = SETTINGS.get(name)
        if key is None or not isinstance(node, Scalar) or not node.text:
            continue
        place = f"{origin}:{node.line}"
        try:
            text = url(node.text) if key == "xds" else node.text
            values[key] = Value(BY_NAME[key].of_text(text), place)
        except ConfigError as error:
            raise misplaced(place, key, error) from None
    return values


def _entries(tree: Node | None) -> Iterator[tuple[str, Node]]:
    if isinstance(tree, Tree):
        for name, node in tree.entries:
            yield name.text, node
