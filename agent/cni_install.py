"""Puts the CNI plugin into a node's network configuration, and takes it out.

A runtime reads the configuration list that sorts first, and may read it at any
moment: files are replaced whole, by rename, and the binary is there before a
list names it and gone after none does. A list gets our plugin as its last; a
single-plugin configuration (.conf) is left as it is and gets a list of ours
that sorts before it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshbpf.agent.core.errors import ConfigError, MeshbpfError

PLUGIN = "meshbpf-cni"
NET_DIR = Path("/etc/cni/net.d")
BIN_DIR = Path("/opt/cni/bin")
PACKAGED = Path("/usr/libexec/meshbpf/meshbpf-cni")
"""Where the Debian package puts the binary."""
_OURS = "00-meshbpf-"
_SUFFIXES = (".conflist", ".conf", ".json")


@dataclass(frozen=True, slots=True)
class Place:
    """The folders that a runtime reads."""

    net_dir: Path = NET_DIR
    bin_dir: Path = BIN_DIR

    @property
    def binary(self) -> Path:
        """The plugin, where the runtime finds it."""
        return self.bin_dir / PLUGIN


def install(place: Place, source: Path, socket: Path, exclude: Sequence[str] = ()) -> Path:
    """Chain the plugin; the list that names it. Repeated, it updates the entry.

    Raises ConfigError when the runtime has no network configuration to be
    chained to, and MeshbpfError when a file cannot be written.
    """
    found = _first(place.net_dir)
    if found is None:
        raise ConfigError(
            "no-network-configuration",
            f"{place.net_dir} has no network configuration to be chained to",
            "set up the cluster's network plugin first, or name its folder with --net-dir",
        )
    entry = {"type": PLUGIN, "socket": str(socket)}
    if exclude:
        entry |= {"excludeNamespaces": list(exclude)}  # type: ignore[dict-item]
    config = _read(found)
    target = found
    if "plugins" not in config:
        target = place.net_dir / f"{_OURS}{found.stem}.conflist"
        version = config.get("cniVersion", "0.3.1")
        single = {k: v for k, v in config.items() if k not in ("cniVersion", "name")}
        config = {"cniVersion": version, "name": config.get("name", "meshbpf"), "plugins": [single]}
    config["plugins"] = [*_others(config), entry]
    try:
        place.bin_dir.mkdir(parents=True, exist_ok=True)
        _copy(source, place.binary)
        _write(target, config)
    except OSError as error:
        raise _failed(error) from error
    return target


def uninstall(place: Place) -> list[Path]:
    """Take the plugin out of every list, then remove it; the files that were changed."""
    changed: list[Path] = []
    try:
        for path in _all(place.net_dir):
            if path.name.startswith(_OURS):
                path.unlink()
                changed.append(path)
                continue
            config = _read(path)
            if len(_others(config)) != len(config.get("plugins", ())):
                config["plugins"] = _others(config)
                _write(path, config)
                changed.append(path)
        if place.binary.exists():
            place.binary.unlink()
            changed.append(place.binary)
    except OSError as error:
        raise _failed(error) from error
    return changed


def _others(config: Mapping[str, Any]) -> list[Any]:
    return [each for each in config.get("plugins", ()) if each.get("type") != PLUGIN]


def _all(net_dir: Path) -> list[Path]:
    """In the order in which runtimes take them."""
    try:
        return sorted(path for path in net_dir.iterdir() if path.suffix in _SUFFIXES)
    except FileNotFoundError:
        return []


def _first(net_dir: Path) -> Path | None:
    return next(iter(_all(net_dir)), None)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError("bad-network-configuration", f"{path}: not JSON: {error}") from error
    plugins = found.get("plugins", []) if isinstance(found, dict) else None
    if not isinstance(plugins, list) or not all(isinstance(each, dict) for each in plugins):
        raise ConfigError("bad-network-configuration", f"{path} is no CNI configuration")
    return dict(found)


def _write(path: Path, config: Mapping[str, Any]) -> None:
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
    _replace(path, (json.dumps(config, indent=2) + "\n").encode(), mode)


def _copy(source: Path, target: Path) -> None:
    fresh = target.with_name(f".{target.name}.new")
    shutil.copyfile(source, fresh)
    fresh.chmod(0o755)
    fresh.replace(target)  # a binary that runs just now stays what it is


def _replace(path: Path, content: bytes, mode: int) -> None:
    # A leading dot and another suffix: no runtime takes it for a configuration.
    fresh = path.with_name(f".{path.name}.new")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _failed(error: OSError) -> MeshbpfError:
    return MeshbpfError(
        "not-written", f"{error.filename}: {error.strerror}", "run it as root, on the node itself"
    )
