"""Mesh state from a file: what counts as a change, and what a bad file does."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from meshbpf.agent.core.errors import ConfigError, Exit, MeshbpfError
from meshbpf.agent.core.state import MeshState
from meshbpf.agent.runtime.state_source import LocalXdsSource

WORKLOAD = """\
  - uid: cluster1//v1/Pod/web/{name}
    name: {name}
    namespace: web
    serviceAccount: {name}
    network: ""
    workloadIps: ["198.18.1.{number}"]
    protocol: HBONE
    node: node1
    services: {{}}
"""


def mesh(*names: str) -> str:
    items = [WORKLOAD.format(name=name, number=index + 1) for index, name in enumerate(names)]
    return "workloads:\n" + "".join(items)


def replace(path: Path, text: str) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(path)


def replace_unseen(path: Path, text: str) -> None:
    """Another file of the same size, with the old one's times."""
    before = path.stat()
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    os.utime(fresh, ns=(before.st_atime_ns, before.st_mtime_ns))
    fresh.replace(path)


def move(path: Path, to: Path) -> None:
    path.rename(to)


def names(state: MeshState) -> list[str]:
    return [workload.name for workload in state.workloads]


class Watched:
    """What the source has handed over so far."""

    def __init__(self, source: LocalXdsSource) -> None:
        self.source = source
        self.states: list[list[str]] = []
        self.refuses = False

    async def apply(self, state: MeshState) -> None:
        if self.refuses:
            raise MeshbpfError("map-full", "too many destinations")
        self.states.append(names(state))

    def told(self) -> str:
        return str(self.source.error)

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(5):
            while not condition():  # noqa: ASYNC110 (the source has no event)
                await trio.sleep(0.02)


@asynccontextmanager
async def watched(path: Path) -> AsyncIterator[Watched]:
    source = LocalXdsSource(path)
    it = Watched(source)
    it.states.append(names(source.load()))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.watch, it)
        yield it
        nursery.cancel_scope.cancel()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "mesh.yaml"
    path.write_text(mesh("a"))
    return path


def test_a_missing_file_at_start_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mesh\.yaml cannot be read: No such file") as caught:
        LocalXdsSource(tmp_path / "mesh.yaml").load()
    assert caught.value.exit_status == Exit.CONFIG


def test_a_wrong_file_at_start_is_refused_with_line_and_field(path: Path) -> None:
    path.write_text(mesh("a", "b").replace("198.18.1.2", "198.18.1.x"))
    with pytest.raises(ConfigError, match=r"mesh\.yaml:\d+: workloads\[1\]\.workloadIps"):
        LocalXdsSource(path).load()


def test_text_that_is_not_utf8_is_refused_with_its_line(path: Path) -> None:
    path.write_bytes(b"workloads:\n\n# \xff\n")
    with pytest.raises(ConfigError, match=r"mesh\.yaml:3: not UTF-8"):
        LocalXdsSource(path).load()


async def test_a_file_that_is_replaced_is_read_again(path: Path) -> None:
    async with watched(path) as it:
        replace(path, mesh("a", "b"))
        await it.until(lambda: it.states == [["a"], ["a", "b"]])
        assert it.source.error is None


async def test_a_file_of_the_same_size_and_time_is_noticed_by_its_inode(path: Path) -> None:
    async with watched(path) as it:
        replace_unseen(path, mesh("z"))
        await it.until(lambda: it.states[-1] == ["z"])


async def test_a_file_written_slowly_is_taken_whole_or_not_at_all(path: Path) -> None:
    async with watched(path) as it:
        text = mesh("a", "b", "c", "d")
        with path.open("w") as file:
            # Each record by itself is good YAML: a cut between two of them shows nowhere.
            for part in text.split("  - "):
                file.write(("  - " if part.startswith("uid") else "") + part)
                file.flush()
                await trio.sleep(0.1)
        await it.until(lambda: it.states[-1] == ["a", "b", "c", "d"])
        assert it.states == [["a"], ["a", "b", "c", "d"]]


async def test_a_bad_file_is_reported_and_the_good_one_after_it_is_taken(path: Path) -> None:
    async with watched(path) as it:
        loaded_at = it.source.loaded_at
        replace(path, "workloads: [{]\n")
        await it.until(lambda: it.told() != "None")
        assert "mesh.yaml:1" in it.told()
        assert it.source.healthy  # it can be read, so the lease goes on
        assert it.source.loaded_at == loaded_at
        assert it.states == [["a"]]
        replace(path, mesh("b"))
        await it.until(lambda: it.states[-1] == ["b"])
        assert it.source.error is None
        assert it.source.statistics().refused == 1


async def test_a_bad_file_is_reported_once_not_at_every_poll(path: Path) -> None:
    async with watched(path) as it:
        replace(path, "nonsense: 1\n")
        await it.until(lambda: it.told() != "None")
        await trio.sleep(1.0)
        assert it.source.statistics().refused == 1


async def test_a_file_that_vanishes_is_a_sick_source_until_it_is_back(path: Path) -> None:
    async with watched(path) as it:
        away = path.with_suffix(".away")
        move(path, away)
        await it.until(lambda: not it.source.healthy)
        assert "No such file" in it.told()
        move(away, path)
        await it.until(lambda: it.source.healthy)
        assert it.source.error is None
        assert it.states == [["a"]]  # unchanged: nothing to apply


async def test_a_state_that_cannot_be_applied_counts_as_refused(path: Path) -> None:
    async with watched(path) as it:
        it.refuses = True
        replace(path, mesh("b"))
        await it.until(lambda: it.told() != "None")
        assert it.source.error is not None
        assert it.source.error.code == "map-full"
        it.refuses = False
        replace(path, mesh("c"))
        await it.until(lambda: it.states[-1] == ["c"])
