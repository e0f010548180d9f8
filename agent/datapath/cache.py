"""A folder of derived things that only this user can write.

What is read here ends up as code in the kernel, so a cache that somebody else
could have written is refused, not just a wrong one. An entry that is missing,
cut short or altered reads as None: it is derived, and made again.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path
from typing import Final

from meshbpf.agent.core.errors import ConfigError

_DIGEST_BYTES: Final = hashlib.sha256().digest_size
_KEEP: Final = 8  # entries of one kind; each is some 20 kB


def private_directory(path: Path) -> Path:
    """`path`, made with mode 0700 if missing. ConfigError unless it is ours alone to write."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = path.stat()
    if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) & 0o022:
        raise ConfigError(
            "cache-not-private",
            f"{path}: uid {info.st_uid}, mode {stat.S_IMODE(info.st_mode):o}: "
            "others could put code for the kernel there",
            f"chown {os.geteuid()} {path} && chmod 700 {path}",
        )
    return path


def read_entry(directory: Path, kind: str, key: str) -> bytes | None:
    """What was written under `kind` and `key`, None when it is not there whole."""
    try:
        raw = _path(directory, kind, key).read_bytes()
    except FileNotFoundError:
        return None
    digest, payload = raw[:_DIGEST_BYTES], raw[_DIGEST_BYTES:]
    if hashlib.sha256(key.encode() + payload).digest() != digest:
        return None
    return payload


def write_entry(directory: Path, kind: str, key: str, payload: bytes) -> None:
    """Store `payload` in one step, mode 0600; entries of `kind` beyond the newest 8 go."""
    descriptor, temporary = tempfile.mkstemp(prefix=".entry-", dir=directory)  # 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(hashlib.sha256(key.encode() + payload).digest() + payload)
        Path(temporary).replace(_path(directory, kind, key))
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    entries: list[tuple[float, Path]] = []
    for path in directory.glob(f"{kind}.*.cached"):
        try:
            entries.append((path.stat().st_mtime, path))
        except FileNotFoundError:
            continue  # another agent tidied it away
    for _, path in sorted(entries, reverse=True)[_KEEP:]:
        path.unlink(missing_ok=True)


def _path(directory: Path, kind: str, key: str) -> Path:
    return directory / f"{kind}.{key}.cached"
