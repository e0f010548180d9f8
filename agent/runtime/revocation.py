"""Revocation lists from files, read again whenever they change.

A place is a folder, each file of which holds lists, or one file (ztunnel's
CRL_PATH). What changes is believed once all of it has stood still
(file_signature.py).

What goes wrong never takes away what is known: a file that is bad, or a
folder that cannot be read, leaves the lists of before in force, and is told in
the log and by `status`. A file that is gone from a folder takes its lists
along, for that is how one is taken back. A place that was never there has no
lists: nothing is revoked then, as with ztunnel.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from meshbpf.agent.core.errors import ConfigError
from meshbpf.agent.core.traffic import Reporter
from meshbpf.agent.runtime.exposition import Family, Kind, labelled
from meshbpf.agent.runtime.file_signature import Signature, read_when_still
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.wire.crl import RevocationList, Revocations, read_lists

POLL_S = 2.0
"""ztunnel gathers changes for as long."""
MAX_BYTES = 64 * 1024 * 1024
"""Some two million entries; a file beyond this is a mistake."""

log = Log("crl")


@dataclass(frozen=True, slots=True)
class _Seen:
    """One look at the place."""

    files: Mapping[Path, Signature] = field(default_factory=dict)
    error: str = ""
    """Why the place cannot be read."""


class RevocationSource:
    """One place."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: _Seen | None = None
        self._lists: dict[Path, tuple[RevocationList, ...]] = {}
        self._errors: dict[Path, ConfigError] = {}
        self.revocations = Revocations()

    def load(self) -> None:
        """The first read, at start."""
        seen = self._look()
        self._apply(seen, self._read(seen))

    async def watch(self) -> None:
        """Put what changes in force, until cancelled."""
        while True:
            await trio.sleep(POLL_S)
            seen = await trio.to_thread.run_sync(self._look)
            if seen == self._seen:
                continue
            read = await read_when_still(self._look, seen, partial(self._read, seen))
            if read is not None:
                self._apply(seen, read)

    def warnings(self) -> list[str]:
        """What is not in force as it stands there, for `status`."""
        return [f"revocation lists: {error.what}" for error in self._errors.values()]

    def families(self) -> Iterator[Family]:
        """The metrics that ztunnel has of it."""
        for name, told, counts in (
            (
                "istio_crl_policy_rejections",
                "The total number of connections rejected due to CRL certificate revocation "
                "(unstable)",
                self.revocations.rejected,
            ),
            (
                "istio_crl_untracked_connections",
                "The total number of connections not tracked for CRL enforcement (unstable)",
                self.revocations.untracked,
            ),
        ):
            values = {reporter.value: counts[reporter] for reporter in Reporter}
            yield labelled(name, told, Kind.COUNTER, "reporter", values)

    def _look(self) -> _Seen:
        """The place's files now. In a folder, those whose names begin with a dot are passed over:
        of a mounted ConfigMap they are what its links lead to.
        """
        try:
            found = os.stat(self._path)
            if not stat.S_ISDIR(found.st_mode):
                return _Seen({self._path: Signature.of(found)})
            files = {}
            for name in sorted(os.listdir(self._path)):
                path = self._path / name
                if not name.startswith(".") and (signature := _signature_of(path)) is not None:
                    files[path] = signature
        except OSError as error:
            return _Seen(error=f"{self._path}: {error.strerror}")
        return _Seen(files)

    def _read(self, seen: _Seen) -> dict[Path, tuple[RevocationList, ...] | ConfigError]:
        """The files that are new or have changed since they were last looked at."""
        before = self._seen.files if self._seen is not None else {}
        found: dict[Path, tuple[RevocationList, ...] | ConfigError] = {}
        for path, signature in seen.files.items():
            if before.get(path) == signature and path not in self._errors:
                continue
            try:
                found[path] = read_lists(_content(path), str(path))
            except ConfigError as error:
                found[path] = error
        return found

    def _apply(
        self, seen: _Seen, read: Mapping[Path, tuple[RevocationList, ...] | ConfigError]
    ) -> None:
        self._seen = seen
        if seen.error:
            self._tell(self._path, _unreadable(seen.error))
            return
        for path in [each for each in self._lists if each not in seen.files]:
            log.warning("revocation lists are gone with their file", file=path)
            del self._lists[path]
        self._errors = {path: self._errors[path] for path in self._errors if path in seen.files}
        for path, found in read.items():
            if isinstance(found, ConfigError):
                self._tell(path, found)
            else:
                self._errors.pop(path, None)
                self._lists[path] = found
        lists = [each for of_file in self._lists.values() for each in of_file]
        ended = self.revocations.replace(lists)
        log.info(
            "revocation lists loaded",
            place=self._path,
            lists=len(lists),
            revoked=sum(len(each.serials) for each in lists),
            tunnels_ended=ended,
        )

    def _tell(self, path: Path, error: ConfigError) -> None:
        self._errors[path] = error
        log.error("revocation lists not read, those of before stay", cause=error)


def _signature_of(path: Path) -> Signature | None:
    """None for what is no file. One that cannot be looked at will say so when it is read."""
    try:
        found = os.stat(path)
    except OSError:
        return Signature(0, 0, 0, 0)
    return Signature.of(found) if stat.S_ISREG(found.st_mode) else None


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise _unreadable(f"{path}: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise _unreadable(f"{path}: it is larger than {MAX_BYTES} bytes")
    return content


def _unreadable(what: str) -> ConfigError:
    return ConfigError(
        "unreadable-crl", what, "give --crl-dir a folder of PEM or DER files, or one such file"
    )
