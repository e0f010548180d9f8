"""The embedded CA's folder: what changes in it is in force, what is wrong with it is told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
from cryptography import x509

from meshbpf.agent import ca_files
from meshbpf.agent.core import ca
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.runtime import embedded_issuer, file_signature
from meshbpf.agent.runtime.embedded_issuer import EmbeddedIssuer

NOW = datetime.now(UTC)
SHOP = SpiffeId("cluster.local", "web", "shop")
QUIET_S = 0.25
"""Several polls and settling times."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_issuer, "POLL_S", 0.02)
    monkeypatch.setattr(file_signature, "SETTLE_S", 0.04)


class Renewals:
    """Counts the calls of `renew_all`."""

    def __init__(self) -> None:
        self.count = 0
        self._called = trio.Event()

    def __call__(self) -> None:
        self.count += 1
        self._called.set()

    async def next(self) -> None:
        with trio.fail_after(5):
            await self._called.wait()
        self._called = trio.Event()


@asynccontextmanager
async def followed(folder: Path) -> AsyncIterator[tuple[EmbeddedIssuer, Renewals]]:
    ca_files.init(folder, "cluster.local", NOW)
    issuer, renewals = EmbeddedIssuer(folder), Renewals()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(issuer.run, renewals)
        yield issuer, renewals
        nursery.cancel_scope.cancel()


def put(folder: Path, name: str, content: bytes) -> None:
    """As Kubernetes and editors do: a new file under the old name."""
    part = folder / f".{name}.part"
    part.write_bytes(content)
    part.chmod(0o600)
    part.rename(folder / name)


def put_ca(folder: Path, authority: ca.CertificateAuthority, roots: bytes) -> None:
    put(folder, ca_files.ROOTS, roots)
    put(folder, ca_files.KEY, authority.key_pem)
    put(folder, ca_files.CHAIN, authority.chain_pem)


async def signer(issuer: EmbeddedIssuer) -> bytes:
    """The key identifier of who signs now."""
    issued = await issuer.issue(SHOP, NOW, NOW + timedelta(hours=1))
    leaf = x509.load_pem_x509_certificate(issued.chain_pem)
    found = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    assert found.key_identifier is not None
    return found.key_identifier


async def test_a_root_beside_the_old_one_is_trusted_and_the_old_ca_signs_on(tmp_path: Path) -> None:
    async with followed(tmp_path / "ca") as (issuer, renewals):
        before = await signer(issuer)
        both = issuer.roots_pem + ca.create("cluster.local", NOW).roots_pem
        put(tmp_path / "ca", ca_files.ROOTS, both)
        await renewals.next()
        assert issuer.roots_pem == both
        assert await signer(issuer) == before


async def test_a_new_ca_signs_once_its_files_are_all_there(tmp_path: Path) -> None:
    async with followed(tmp_path / "ca") as (issuer, renewals):
        before = await signer(issuer)
        new = ca.create("cluster.local", NOW)
        put_ca(tmp_path / "ca", new, issuer.roots_pem + new.roots_pem)
        await renewals.next()
        await trio.sleep(QUIET_S)
        assert await signer(issuer) != before
        assert issuer.warnings() == ()


async def test_half_a_rotation_is_told_and_the_ca_of_before_signs_on(tmp_path: Path) -> None:
    async with followed(tmp_path / "ca") as (issuer, renewals):
        before, roots = await signer(issuer), issuer.roots_pem
        new = ca.create("cluster.local", NOW)
        put(tmp_path / "ca", ca_files.KEY, new.key_pem)
        await trio.sleep(QUIET_S)
        (warning,) = issuer.warnings()
        assert "the CA key does not belong to the CA certificate" in warning
        assert (await signer(issuer), issuer.roots_pem, renewals.count) == (before, roots, 0)
        put_ca(tmp_path / "ca", new, roots + new.roots_pem)
        await renewals.next()
        await trio.sleep(QUIET_S)
        assert issuer.warnings() == ()
        assert await signer(issuer) != before


async def test_a_ca_of_another_trust_domain_is_refused(tmp_path: Path) -> None:
    async with followed(tmp_path / "ca") as (issuer, renewals):
        other = ca.create("example.org", NOW)
        put_ca(tmp_path / "ca", other, other.roots_pem)
        await trio.sleep(2 * QUIET_S)
        (warning,) = issuer.warnings()
        assert "example.org" in warning
        assert (issuer.trust_domain, renewals.count) == ("cluster.local", 0)


async def test_a_key_that_others_may_read_is_refused_while_running_too(tmp_path: Path) -> None:
    async with followed(tmp_path / "ca") as (issuer, renewals):
        key = tmp_path / "ca" / ca_files.KEY
        key.write_bytes(key.read_bytes())
        key.chmod(0o644)
        await trio.sleep(QUIET_S)
        (warning,) = issuer.warnings()
        assert "mode 0644" in warning
        assert renewals.count == 0


async def test_files_written_again_unchanged_renew_nothing(tmp_path: Path) -> None:
    async with followed(tmp_path / "ca") as (issuer, renewals):
        for name in ca_files.NAMES:
            put(tmp_path / "ca", name, (tmp_path / "ca" / name).read_bytes())
        await trio.sleep(QUIET_S)
        assert (renewals.count, issuer.warnings()) == (0, ())


async def test_a_folder_that_is_gone_takes_nothing_away(tmp_path: Path) -> None:
    async with followed(tmp_path / "ca") as (issuer, renewals):
        (tmp_path / "ca").rename(tmp_path / "away")
        await trio.sleep(QUIET_S)
        assert "holds no CA" in issuer.warnings()[0]
        await signer(issuer)
        (tmp_path / "away").rename(tmp_path / "ca")
        await trio.sleep(QUIET_S)
        assert (renewals.count, issuer.warnings()) == (0, ())
