"""The manifest files of a directory: which there are, and whether one changed.

Files that end in .yaml, .yml or .json, in the directory and below; names that
begin with a dot are left alone, editors' and a mounted ConfigMap's own among
them, whose visible entries are links into a hidden directory. Links to files
are followed, links to directories are not: there can be no loop.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from meshbpf.agent.core.errors import ConfigError
from meshbpf.agent.runtime.file_signature import Signature

SUFFIXES = (".yaml", ".yml", ".json")
MAX_BYTES = 256 * 1024 * 1024
"""For all of them; ztunnel takes xDS messages of at most 200 MiB."""
MAX_FILES = 20_000
CODE = "unreadable-manifests"


def look(directory: Path) -> dict[str, Signature]:
    """The files by path below `directory`, in order. Raises OSError when it cannot be listed."""
    found: dict[str, Signature] = {}
    for path in _files(directory):
        try:
            found[str(path.relative_to(directory))] = Signature.of(path.stat())
        except FileNotFoundError:
            continue  # gone between the two calls
        if len(found) > MAX_FILES:
            raise ConfigError(CODE, f"{directory} has more than {MAX_FILES} manifest files")
    if sum(signature.size for signature in found.values()) > MAX_BYTES:
        raise ConfigError(CODE, f"the manifests in {directory} are larger than {MAX_BYTES} bytes")
    return dict(sorted(found.items()))


def _files(directory: Path) -> Iterator[Path]:
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                try:
                    yield from _files(Path(entry.path))
                except FileNotFoundError:
                    continue  # removed while we looked
            elif entry.name.endswith(SUFFIXES) and entry.is_file():
                yield Path(entry.path)


def read(path: Path) -> str:
    """A file's text. ConfigError with the line where it is not UTF-8."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(CODE, f"{path} cannot be read: {error.strerror}") from error
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError("bad-manifest", f"{path}:{line}: not UTF-8: {error.reason}") from error
