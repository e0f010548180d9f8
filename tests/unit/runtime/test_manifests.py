"""Mesh state from a directory of manifests: what counts as a change, and what a bad file does."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from textwrap import dedent

import pytest
import trio

from meshbpf.agent.core.errors import ConfigError, MeshbpfError
from meshbpf.agent.core.state import MeshState
from meshbpf.agent.runtime.manifests import ManifestSource
from tests.unit.core.kube import BY_HAND, POD

POLICY = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec: {action: DENY, rules: [{to: [{operation: {ports: ["80"]}}]}]}
"""


def pod(name: str) -> str:
    return dedent(POD).replace("web-0", name)


class Watched:
    """What the source has handed over so far."""

    def __init__(self, source: ManifestSource) -> None:
        self.source = source
        self.states: list[MeshState] = []
        self.refuses = False

    async def apply(self, state: MeshState) -> None:
        if self.refuses:
            raise MeshbpfError("map-full", "too many destinations")
        self.states.append(state)

    def names(self) -> list[str]:
        return sorted(each.name for each in self.states[-1].workloads)

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(5):
            while not condition():  # noqa: ASYNC110 (the source has no event)
                await trio.sleep(0.02)


@asynccontextmanager
async def watched(path: Path) -> AsyncIterator[Watched]:
    source = ManifestSource(path, BY_HAND)
    it = Watched(source)
    it.states.append(source.load())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.watch, it)
        yield it
        nursery.cancel_scope.cancel()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "mesh"
    path.mkdir()
    (path / "a.yaml").write_text(pod("a"))
    return path


def test_every_manifest_below_is_read_and_what_is_hidden_is_not(path: Path) -> None:
    (path / "sub").mkdir()
    (path / "sub" / "b.yml").write_text(pod("b"))
    (path / "c.json").write_text(
        '{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "c"}, '
        '"status": {"podIP": "198.18.1.3"}}'
    )
    (path / ".d.yaml").write_text("not: a manifest")
    (path / "README.md").write_text("nor this")
    state = ManifestSource(path, BY_HAND).load()
    assert sorted(each.name for each in state.workloads) == ["a", "b", "c"]


def test_an_empty_directory_is_an_empty_mesh(tmp_path: Path) -> None:
    assert ManifestSource(tmp_path, BY_HAND).load() == MeshState()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("kind: Pod", r"b\.yaml:1: apiVersion is missing"),
        (POLICY.replace('"80"', "http"), r"b\.yaml:1: AuthorizationPolicy shop/p: spec\.rules"),
        (pod("a"), r"b\.yaml:1: Pod shop/a: metadata\.name: the object is in .*a\.yaml:1 already"),
        ("a: \udcff", r"b\.yaml:1: not UTF-8"),
    ],
)
def test_a_bad_directory_is_refused_at_the_start(path: Path, text: str, what: str) -> None:
    (path / "b.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=what):
        ManifestSource(path, BY_HAND).load()


def test_a_directory_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        ManifestSource(tmp_path / "x", BY_HAND).load()


async def test_files_that_come_change_and_go_are_followed(path: Path) -> None:
    async with watched(path) as it:
        (path / "b.yaml").write_text(pod("b"))
        await it.until(lambda: it.names() == ["a", "b"])
        (path / "a.yaml").write_text(pod("c"))
        await it.until(lambda: it.names() == ["b", "c"])
        (path / "b.yaml").unlink()
        await it.until(lambda: it.names() == ["c"])
        assert it.source.error is None
        assert it.source.statistics().refused == 0


async def test_a_mounted_config_map_is_followed_when_its_link_is_swapped(tmp_path: Path) -> None:
    # As the kubelet's atomic writer lays it out.
    for version, name in (("..1", "a"), ("..2", "b")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "mesh.yaml").write_text(pod(name))
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "mesh.yaml").symlink_to("..data/mesh.yaml")
    async with watched(tmp_path) as it:
        assert it.names() == ["a"]
        (tmp_path / "..new").symlink_to("..2")
        os.replace(tmp_path / "..new", tmp_path / "..data")
        await it.until(lambda: it.names() == ["b"])


async def test_a_file_that_turns_bad_keeps_its_objects_while_the_others_change(path: Path) -> None:
    (path / "b.yaml").write_text(pod("b"))
    async with watched(path) as it:
        (path / "b.yaml").write_text("{")
        await it.until(lambda: it.source.error is not None)
        assert it.names() == ["a", "b"]
        (path / "a.yaml").write_text(pod("c"))
        await it.until(lambda: it.names() == ["b", "c"])
        await it.until(lambda: it.source.error is not None)
        assert "b.yaml:2: not YAML" in it.source.warnings()[0]
        assert it.source.healthy
        (path / "b.yaml").write_text(pod("d"))
        await it.until(lambda: it.names() == ["c", "d"])
        await it.until(lambda: it.source.error is None)
        assert it.source.warnings() == ()


async def test_an_object_that_turns_bad_keeps_its_last_good_form(path: Path) -> None:
    (path / "p.yaml").write_text(POLICY)
    async with watched(path) as it:
        good = it.states[-1].policies
        (path / "p.yaml").write_text(POLICY.replace('"80"', "http"))
        await it.until(lambda: it.source.error is not None)
        assert it.states[-1].policies == good
        assert "AuthorizationPolicy shop/p" in str(it.source.error)


async def test_a_state_that_cannot_be_applied_is_offered_again_with_the_next_change(
    path: Path,
) -> None:
    async with watched(path) as it:
        it.refuses = True
        (path / "b.yaml").write_text(pod("b"))
        await it.until(lambda: it.source.error is not None)
        it.refuses = False
        (path / "c.yaml").write_text(pod("c"))
        await it.until(lambda: it.names() == ["a", "b", "c"])


async def test_a_directory_that_vanishes_is_an_illness_and_its_return_a_recovery(
    path: Path,
) -> None:
    away = path.with_name("away")
    async with watched(path) as it:
        os.rename(path, away)
        await it.until(lambda: not it.source.healthy)
        assert it.names() == ["a"]
        os.rename(away, path)
        await it.until(lambda: it.source.healthy)
        assert it.source.error is None
