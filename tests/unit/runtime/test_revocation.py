"""Revocation lists from files: what counts as a change, and what a bad file does."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio

from meshbpf.agent.core import ca
from meshbpf.agent.core.traffic import Reporter
from meshbpf.agent.runtime import file_signature, revocation
from meshbpf.agent.runtime.exposition import render
from meshbpf.agent.runtime.revocation import RevocationSource
from meshbpf.agent.wire.crl import Issuer, Standing, links_of
from tests.revoking import crl_pem

pytestmark = pytest.mark.compat

AUTHORITY = ca.create("cluster.local", datetime.now(UTC))
SERIAL = AUTHORITY.issuer.serial_number


def revoked(source: RevocationSource) -> bool:
    """Whether a peer of one known serial number would be refused."""
    links = links_of(AUTHORITY.issuer, [Issuer.of(AUTHORITY.issuer)])
    return not source.revocations.accepts(Standing(source.revocations, Reporter.SOURCE, "x", links))


def crl(*serials: int) -> bytes:
    return crl_pem(AUTHORITY.issuer, AUTHORITY.key, *serials)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "crl"
    path.mkdir()
    return path


def loaded(path: Path) -> RevocationSource:
    source = RevocationSource(path)
    source.load()
    return source


@asynccontextmanager
async def watching(path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RevocationSource]:
    """A source that polls often."""
    monkeypatch.setattr(revocation, "POLL_S", 0.01)
    monkeypatch.setattr(file_signature, "SETTLE_S", 0.01)
    source = loaded(path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.watch)
        yield source
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool], within_s: float = 3.0) -> None:
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110 - nothing announces what is waited for
            await trio.sleep(0.01)


def replace(path: Path, content: bytes) -> None:
    """As a careful writer does it."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_bytes(content)
    os.replace(fresh, path)


def test_every_file_of_a_folder_counts(folder: Path) -> None:
    (folder / "a.pem").write_bytes(crl(1))
    (folder / "b.crl").write_bytes(crl(SERIAL))
    source = loaded(folder)
    assert revoked(source)
    assert source.warnings() == []


def test_one_file_may_be_the_place(folder: Path) -> None:
    (folder / "a.pem").write_bytes(crl(SERIAL))
    assert revoked(loaded(folder / "a.pem"))


def test_a_place_that_is_not_there_revokes_nothing_and_is_told(folder: Path) -> None:
    source = loaded(folder / "none")
    assert not revoked(source)
    assert source.warnings() == [
        f"revocation lists: {folder}/none: No such file or directory",
    ]


def test_a_bad_file_is_told_and_the_others_count(folder: Path) -> None:
    (folder / "a.pem").write_bytes(b"nonsense")
    (folder / "b.pem").write_bytes(crl(SERIAL))
    (folder / "c.pem").symlink_to(folder / "nowhere")
    source = loaded(folder)
    assert revoked(source)
    bad, missing = source.warnings()
    assert bad.startswith(f"revocation lists: {folder}/a.pem is no certificate revocation list")
    assert missing == f"revocation lists: {folder}/c.pem: No such file or directory"


def test_a_file_beyond_the_limit_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revocation, "MAX_BYTES", 10)
    (folder / "a.pem").write_bytes(crl(SERIAL))
    source = loaded(folder)
    assert not revoked(source)
    assert "larger than 10 bytes" in source.warnings()[0]


async def test_a_change_is_seen_and_a_bad_one_keeps_what_was_good(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "a.pem"
    file.write_bytes(crl())
    async with watching(folder, monkeypatch) as source:
        replace(file, crl(SERIAL))
        await until(lambda: revoked(source))
        file.write_bytes(b"cut in the mid")
        await until(lambda: bool(source.warnings()))
        assert revoked(source)
        replace(file, crl())
        await until(lambda: not revoked(source))
        assert source.warnings() == []


async def test_a_place_that_comes_late_is_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with watching(folder / "late", monkeypatch) as source:
        (folder / "late").mkdir()
        await until(lambda: not source.warnings())
        (folder / "late" / "a.pem").write_bytes(crl(SERIAL))
        await until(lambda: revoked(source))


async def test_a_folder_that_goes_keeps_its_lists_and_a_file_that_goes_does_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "a.pem").write_bytes(crl(SERIAL))
    away = folder.with_name("away")
    async with watching(folder, monkeypatch) as source:
        os.rename(folder, away)
        await until(lambda: bool(source.warnings()))
        assert revoked(source)
        os.rename(away, folder)
        await until(lambda: not source.warnings())
        (folder / "a.pem").unlink()
        await until(lambda: not revoked(source))


async def test_the_swap_of_a_mounted_configmap_is_a_change(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in (("..1", crl()), ("..2", crl(SERIAL))):
        (folder / name).mkdir()
        (folder / name / "ca-crl.pem").write_bytes(content)
    (folder / "..data").symlink_to("..1")
    (folder / "ca-crl.pem").symlink_to("..data/ca-crl.pem")
    async with watching(folder, monkeypatch) as source:
        assert not revoked(source)
        (folder / "..tmp").symlink_to("..2")
        (folder / "..tmp").rename(folder / "..data")
        await until(lambda: revoked(source))
    assert source.warnings() == []


def test_metrics_have_ztunnels_names_and_a_value_for_each_reporter(folder: Path) -> None:
    (folder / "a.pem").write_bytes(crl(SERIAL))
    source = loaded(folder)
    assert revoked(source)
    text = "".join(render(family, openmetrics=False) for family in source.families())
    assert [line for line in text.splitlines() if not line.startswith("#")] == [
        'istio_crl_policy_rejections_total{reporter="destination"} 0',
        'istio_crl_policy_rejections_total{reporter="source"} 1',
        'istio_crl_untracked_connections_total{reporter="destination"} 0',
        'istio_crl_untracked_connections_total{reporter="source"} 0',
    ]
