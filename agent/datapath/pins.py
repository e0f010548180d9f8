"""One agent's folder in bpffs, and taking over what another schema left there.

    <bpffs>/meshbpf/<agent id>/<schema>/maps/<map>
                                       /links/<pod index>/<hook>
                                       /cgroup/<hook>

An agent of the same schema finds its maps and links and has nothing to do.
One of another schema, after an upgrade, finds a foreign folder beside its
own. A map whose definition is the same in both is the same map: it gets a
second name, and loses the first when the foreign folder goes. So socket
storage, which no one can copy, stays with its sockets, and the mesh map stays
full. The links follow one by one, each with a single LINK_UPDATE; only then is
the foreign folder removed. An agent that is killed in the middle of this
leaves a state from which the next one goes on.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.datapath import bpfsys
from meshbpf.agent.datapath.bpfcall import BpfError
from meshbpf.agent.datapath.bpffs import PIN_ROOT
from meshbpf.agent.datapath.maps import Map, MapMismatchError
from meshbpf.agent.datapath.pinned import drop
from meshbpf.bpf import MAPS, MapSpec

MAPS_DIRECTORY: Final = "maps"
LINKS_DIRECTORY: Final = "links"
CGROUP_DIRECTORY: Final = "cgroup"


@dataclass(frozen=True, slots=True)
class OpenedMaps:
    """All maps by name; `fresh` are those that were made just now, and are empty."""

    maps: dict[str, Map]
    fresh: frozenset[str]


@dataclass(frozen=True, slots=True)
class Pins:
    """The folder of one agent and schema."""

    agent: Path
    schema: str

    @classmethod
    def of(cls, agent_id: str, schema: str) -> Pins:
        """The folder's place, whether or not it exists."""
        return cls(PIN_ROOT / _file_name(agent_id), schema)

    @property
    def directory(self) -> Path:
        """Of this schema."""
        return self.agent / self.schema

    def foreign(self) -> tuple[Path, ...]:
        """Folders of other schemas of the same agent."""
        if not self.agent.is_dir():
            return ()
        return tuple(sorted(path for path in self.agent.iterdir() if path.name != self.schema))

    def pod(self, index: int) -> Path:
        """Where a pod's links are pinned."""
        return self.directory / LINKS_DIRECTORY / str(index)

    def cgroup(self) -> Path:
        """Where the connect hooks are pinned."""
        return self.directory / CGROUP_DIRECTORY

    def inherited(self, path: Path) -> tuple[Path, ...]:
        """Where other schemas would have pinned the same thing."""
        relative = path.relative_to(self.directory)
        return tuple(one / relative for one in self.foreign() if (one / relative).exists())

    def create(self) -> int:
        """Make the folders. The descriptor, while it is open, says that an agent lives here."""
        PIN_ROOT.mkdir(mode=0o700, exist_ok=True)
        with exclusive(PIN_ROOT):  # no sweep between making the folder and claiming it
            self._make_folders()
            return claim(self.agent, fcntl.LOCK_SH)

    def _make_folders(self) -> None:
        for name in (MAPS_DIRECTORY, LINKS_DIRECTORY, CGROUP_DIRECTORY):
            (self.directory / name).mkdir(mode=0o700, parents=True, exist_ok=True)

    def open_maps(self) -> OpenedMaps:
        """Own pins, else equal maps of another schema, else new ones.

        None stays open on failure.
        """
        with ExitStack() as stack:
            maps: dict[str, Map] = {}
            fresh = set()
            for spec in MAPS:
                found = self._adopted(spec)
                if found is None:
                    found = Map.create(spec)
                    fresh.add(spec.name)
                    stack.callback(found.close)
                    bpfsys.obj_pin(found.fileno(), self._map_pin(spec))
                else:
                    stack.callback(found.close)
                maps[spec.name] = found
            if "records" in fresh and self.foreign():
                raise MeshbpfError(
                    "foreign-records",
                    f"{self.agent}: pods were attached by a version this one cannot read",
                    "detach them with that version, or `rm -r` the folder after stopping the pods",
                )
            stack.pop_all()
        return OpenedMaps(maps, frozenset(fresh))

    def _map_pin(self, spec: MapSpec) -> Path:
        return self.directory / MAPS_DIRECTORY / spec.name

    def _adopted(self, spec: MapSpec) -> Map | None:
        own = self._map_pin(spec)
        found = _open_if_there(spec, own)
        if found is not None:
            return found
        for path in self.inherited(own):
            with suppress(MapMismatchError):
                found = _open_if_there(spec, path)
            if found is not None:
                bpfsys.obj_pin(found.fileno(), own)
                return found
        return None

    def remove_foreign(self) -> None:
        """Remove other schemas' pins, once everything has been taken over."""
        for path in self.foreign():
            remove_tree(path)

    def remove_pod(self, index: int) -> None:
        """Remove a pod's folder with whatever pins it has, here and elsewhere."""
        for path in (self.pod(index), *self.inherited(self.pod(index))):
            remove_tree(path)

    def remove(self) -> None:
        """Remove everything of this agent."""
        remove_tree(self.agent)


def claim(directory: Path, kind: int) -> int:
    """A locked descriptor of the folder. BlockingIOError with LOCK_NB when others hold it."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, kind)
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextmanager
def exclusive(directory: Path, more: int = 0) -> Iterator[None]:
    """Nobody else has claimed the folder for the time of the block."""
    fd = claim(directory, fcntl.LOCK_EX | more)
    try:
        yield
    finally:
        os.close(fd)


def _file_name(text: str) -> str:
    # bpffs takes no dot in a name; a file name must not have a slash.
    return "".join(
        chr(byte) if re.match(rb"[A-Za-z0-9-]", bytes((byte,))) else f"_{byte:02x}"
        for byte in text.encode()
    )


def _open_if_there(spec: MapSpec, path: Path) -> Map | None:
    try:
        return Map.open(spec, path)
    except BpfError as error:
        if error.errno != errno.ENOENT:
            raise
        return None


def _pins(directory: Path) -> Iterator[Path]:
    for path in directory.iterdir():
        if path.is_dir():
            yield from _pins(path)
        else:
            yield path


def remove_tree(directory: Path) -> None:
    """Unpin everything below, detaching links, and remove the folders. Repeatable."""
    if not directory.is_dir():
        return
    for pin in list(_pins(directory)):
        if pin.parent.name == MAPS_DIRECTORY:
            pin.unlink(missing_ok=True)
        else:
            drop(pin)
    for path in sorted((p for p in directory.rglob("*") if p.is_dir()), reverse=True):
        path.rmdir()
    directory.rmdir()
