"""Mesh state from a directory of Kubernetes and Istio manifests, read again when it changes.

A change is believed once all files together have stood still
(file_signature.py); only the files that changed are parsed again. A file that
is no manifest any more keeps its last good objects, and an object that cannot
be read keeps its last good form; both are told by name, field and reason. At
the start there is no last good form, and a bad directory is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Literal

import trio

from meshbpf.agent.core.errors import ConfigError, MeshbpfError
from meshbpf.agent.core.kube_cluster import Cluster, Problem
from meshbpf.agent.core.kube_names import CORE
from meshbpf.agent.core.kube_state import ClusterState, Standing
from meshbpf.agent.core.manifest import parse_manifest
from meshbpf.agent.core.objects import KubeObject, ObjectKey, ObjectSet
from meshbpf.agent.core.state import MeshState
from meshbpf.agent.runtime import manifest_files
from meshbpf.agent.runtime.certs import utc_now
from meshbpf.agent.runtime.file_signature import Signature, read_when_still
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.runtime.mesh_source import MeshWriter, SourceStatistics

POLL_S = 0.3
TOLD_MOST = 20
"""Problems that are logged and shown; beyond, their number is."""

log = Log("state")

Files = Mapping[str, Signature]


class ManifestSource:
    """One directory of manifests."""

    def __init__(
        self, path: Path, cluster: Cluster, *, now: Callable[[], datetime] = utc_now
    ) -> None:
        self._path = path
        self._now = now
        self._cluster = ClusterState(cluster)
        self._seen: Files | None = None
        self._readable = True
        self._parsed: dict[str, tuple[KubeObject, ...]] = {}
        self._file_errors: dict[str, ConfigError] = {}
        self._twice: tuple[Problem, ...] = ()
        self._problems: tuple[Problem, ...] = ()
        self._loads = self._refused = 0
        self.objects: ObjectSet | None = ObjectSet.EMPTY
        """Those in force, for whoever reads kinds that are not the mesh's."""
        self.loaded_at: datetime | None = None
        self.error: MeshbpfError | None = None

    @property
    def kind(self) -> Literal["manifests"]:
        """What kind of place it is."""
        return "manifests"

    @property
    def origin(self) -> str:
        """The directory."""
        return str(self._path)

    @property
    def healthy(self) -> bool:
        """The directory can be read. A bad content is no illness of the source."""
        return self._readable

    async def find_pod(self, namespace: str, name: str) -> KubeObject | None:
        """As the manifests have it."""
        return None if self.objects is None else self.objects.get(CORE, "Pod", namespace, name)

    def warnings(self) -> tuple[str, ...]:
        """What is wrong with single files and objects."""
        found = [error.what for error in self._file_errors.values()]
        found += map(str, (*self._twice, *self._problems))
        if len(found) > TOLD_MOST:
            found[TOLD_MOST:] = [f"and {len(found) - TOLD_MOST} more"]
        return tuple(found)

    def load(self) -> MeshState:
        """The first read, at start: raises ConfigError for the first thing that is wrong."""
        read_at = self._now()
        try:
            files = manifest_files.look(self._path)
        except OSError as error:
            raise self._unreadable(str(error.strerror)) from error
        self._parse(files, {name: manifest_files.read(self._path / name) for name in files})
        for broken in self._file_errors.values():
            raise broken
        standing = self._standing()
        for problem in (*self._twice, *standing.problems):
            if problem in self._twice or problem.key in standing.translation.broken:
                raise ConfigError("bad-object", str(problem), "correct it there")
        self._seen = files
        self._accept(standing, read_at)
        return standing.translation.state

    async def watch(
        self, mesh: MeshWriter, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Put each new good state into `mesh`, until cancelled.

        `mesh` may raise MeshbpfError: the state then counts as refused and
        is offered again when a file changes next.
        """
        task_status.started()
        while True:
            await trio.sleep(POLL_S)
            try:
                files = await trio.to_thread.run_sync(manifest_files.look, self._path)
            except (OSError, ConfigError) as error:
                self._lost(error)
                continue
            if not self._readable:
                self._readable, self.error = True, None
                log.info("mesh manifests are back", directory=self._path)
            if files != self._seen:
                await self._reload(files, mesh)

    def statistics(self) -> SourceStatistics:
        """Counters since the start."""
        return SourceStatistics(self._loads, self._refused)

    async def _reload(self, files: Files, mesh: MeshWriter) -> None:
        read_at = self._now()
        before = self._seen or {}
        changed = [name for name in files if before.get(name) != files[name]]
        errors: dict[str, ConfigError] = {}
        texts = await read_when_still(self._look, files, lambda: self._read(changed, errors))
        if texts is None:
            return
        self._seen = files
        await trio.to_thread.run_sync(self._parse, files, texts)
        self._file_errors.update(errors)
        try:
            standing = await trio.to_thread.run_sync(self._standing)
            # Whoever reads other kinds does it as a part of `apply`.
            self.objects = standing.objects
            await mesh.apply(standing.translation.state)
        except MeshbpfError as error:
            self._refuse(error)
            return
        self._accept(standing, read_at)
        state = standing.translation.state
        log.info(
            "mesh state loaded",
            directory=self._path,
            workloads=len(state.workloads),
            services=len(state.services),
            policies=len(state.policies),
        )
        warnings = self.warnings()
        if self._file_errors or self._twice or standing.broken:
            self._refuse(ConfigError("bad-object", warnings[0], "the rest is in force"))
        for warning in warnings[1:] if self.error else warnings:
            log.warning("mesh manifests", problem=warning)

    def _look(self) -> Files | None:
        try:
            return manifest_files.look(self._path)
        except (OSError, ConfigError):
            return None  # the next poll tells

    def _read(self, names: list[str], errors: dict[str, ConfigError]) -> dict[str, str]:
        texts: dict[str, str] = {}
        for name in names:
            try:
                texts[name] = manifest_files.read(self._path / name)
            except ConfigError as error:
                errors[name] = error
        return texts

    def _parse(self, files: Files, texts: Mapping[str, str]) -> None:
        """Take in the files that changed, and forget those that are gone."""
        for name in self._parsed.keys() - files.keys():
            del self._parsed[name]
        for name in self._file_errors.keys() - files.keys():
            del self._file_errors[name]
        for name, text in texts.items():
            try:
                self._parsed[name] = parse_manifest(text, str(self._path / name))
            except ConfigError as error:
                self._file_errors[name] = error
            else:
                self._file_errors.pop(name, None)

    def _standing(self) -> Standing:
        by_key: dict[ObjectKey, KubeObject] = {}
        twice: list[Problem] = []
        for name in sorted(self._parsed):
            for each in self._parsed[name]:
                first = by_key.setdefault(each.key, each)
                if first is not each:
                    reason = f"the object is in {first.origin} already"
                    twice.append(Problem(each.key, "metadata.name", reason, "ignored", each.origin))
        self._twice = tuple(twice)
        return self._cluster.update(ObjectSet.of(by_key.values()))

    def _accept(self, standing: Standing, read_at: datetime) -> None:
        self._loads += 1
        self.objects = standing.objects
        self._problems = standing.problems
        self.loaded_at = read_at
        self.error = None

    def _refuse(self, error: MeshbpfError) -> None:
        self._refused += 1
        self.error = error
        log.error("mesh manifests refused, what was good stays", cause=error)

    def _lost(self, error: OSError | ConfigError) -> None:
        if self._readable:
            self._readable = False
            why = error.what if isinstance(error, ConfigError) else str(error.strerror)
            self._refuse(self._unreadable(why))

    def _unreadable(self, why: str) -> ConfigError:
        return ConfigError(
            manifest_files.CODE,
            f"mesh manifests in {self._path} cannot be read: {why}",
            "give --manifests a directory of Kubernetes and Istio objects in YAML",
        )
