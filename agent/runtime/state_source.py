"""Mesh state from a file, read again whenever it changes.

When a change is believed: file_signature.py.

A file that is wrong is reported and the last good state stays in force.
Parsing runs in a thread: 10,000 workloads take seconds of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Literal

import trio

from meshbpf.agent.core.errors import ConfigError, MeshbpfError
from meshbpf.agent.core.local_xds import parse_local_xds
from meshbpf.agent.core.objects import KubeObject
from meshbpf.agent.core.state import MeshState
from meshbpf.agent.runtime.certs import utc_now
from meshbpf.agent.runtime.file_signature import Signature, read_when_still, signature_of
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.runtime.mesh_source import MeshWriter, SourceStatistics

POLL_S = 0.3
MAX_BYTES = 256 * 1024 * 1024
"""ztunnel takes xDS messages of at most 200 MiB; a file beyond this is a mistake."""

log = Log("state")


class LocalXdsSource:
    """One LOCAL_XDS file."""

    def __init__(self, path: Path, *, now: Callable[[], datetime] = utc_now) -> None:
        self._path = path
        self._now = now
        self._seen: Signature | None = None
        self._readable = True
        self._loads = self._refused = 0
        self.loaded_at: datetime | None = None
        """When the content in force was read: a file written later is not in force yet."""
        self.error: MeshbpfError | None = None
        """Why the newest content is not in force; None when it is."""

    @property
    def kind(self) -> Literal["local-xds"]:
        """What kind of place it is."""
        return "local-xds"

    @property
    def objects(self) -> None:
        """There are none in this format."""
        return None

    async def find_pod(self, namespace: str, name: str) -> KubeObject | None:
        """There are none in this format."""
        return None

    def warnings(self) -> tuple[str, ...]:
        """The file is taken whole or refused whole: nothing is ever wrong with a part."""
        return ()

    @property
    def origin(self) -> str:
        """What to show for the place where the state comes from."""
        return str(self._path)

    @property
    def healthy(self) -> bool:
        """The file can be read. A bad content is no illness of the source."""
        return self._readable

    def load(self) -> MeshState:
        """The first read, at start: raises ConfigError with line and field."""
        before = self._look()
        if before is None:
            raise self._unreadable(self._why_unreadable())
        read_at = self._now()
        state = self._parse(self._read())
        self._seen = before
        self._accept(read_at)
        return state

    async def watch(
        self, mesh: MeshWriter, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Put each new good state into `mesh`, until cancelled.

        `mesh` may raise MeshbpfError: the state then counts as refused and
        is offered again when the file changes next.
        """
        task_status.started()
        while True:
            await trio.sleep(POLL_S)
            found = self._look()
            if found is None:
                self._lost()
                continue
            if found == self._seen and self._readable:
                continue
            await self._reload(found, mesh)

    def statistics(self) -> SourceStatistics:
        """Counters since the start."""
        return SourceStatistics(self._loads, self._refused)

    async def _reload(self, found: Signature, mesh: MeshWriter) -> None:
        read_at = self._now()
        try:
            text = await read_when_still(self._look, found, self._read)
            if text is None:
                return
            self._readable = True
            if found == self._seen:
                self.error = None
                log.info("mesh state file is back, unchanged", file=self._path)
                return
            self._seen = found
            state = await trio.to_thread.run_sync(self._parse, text)
            await mesh.apply(state)
        except MeshbpfError as error:
            self._refuse(error)
        else:
            self._accept(read_at)
            log.info(
                "mesh state loaded",
                file=self._path,
                workloads=len(state.workloads),
                services=len(state.services),
                policies=len(state.policies),
            )

    def _look(self) -> Signature | None:
        return signature_of(self._path)

    def _read(self) -> str:
        try:
            with self._path.open("rb") as file:
                content = file.read(MAX_BYTES + 1)
        except OSError as error:
            self._readable = False
            raise self._unreadable(str(error.strerror)) from error
        if len(content) > MAX_BYTES:
            raise self._unreadable(f"it is larger than {MAX_BYTES} bytes")
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise ConfigError(
                "bad-local-xds", f"{self._path}:{line}: not UTF-8: {error.reason}"
            ) from error

    def _parse(self, text: str) -> MeshState:
        try:
            return parse_local_xds(text, self.origin)
        except ConfigError as error:
            if not error.hint:
                error.hint = "correct it there; the keys are those of ztunnel's LOCAL_XDS file"
            raise

    def _accept(self, read_at: datetime) -> None:
        self._loads += 1
        self.loaded_at = read_at
        self.error = None

    def _refuse(self, error: MeshbpfError) -> None:
        self._refused += 1
        self.error = error
        log.error("mesh state refused, the last good one stays", cause=error)

    def _lost(self) -> None:
        if self._readable:
            self._readable = False
            self._refuse(self._unreadable(self._why_unreadable()))

    def _why_unreadable(self) -> str:
        try:
            os.stat(self._path)
        except OSError as error:
            return str(error.strerror)
        return "it was not there a moment ago"

    def _unreadable(self, why: str) -> ConfigError:
        return ConfigError(
            "unreadable-local-xds",
            f"mesh state file {self._path} cannot be read: {why}",
            "give --local-xds a file in ztunnel's LOCAL_XDS format",
        )
