"""Certificates: asked for once, renewed at half their life, forgotten with their last pod."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import trio
from trio.testing import MockClock

from meshbpf.agent import ca_files
from meshbpf.agent.core import ca
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.runtime.certs import HURRY_SPREAD_S, CertificateStore
from meshbpf.agent.runtime.embedded_issuer import EmbeddedIssuer
from meshbpf.agent.runtime.issuing import Issued

START = datetime(2026, 5, 1, tzinfo=UTC)
TTL = timedelta(hours=1)
SHOP = SpiffeId("cluster.local", "web", "shop")
STOCK = SpiffeId("cluster.local", "web", "stock")
OTHER = SpiffeId("cluster.local", "web", "other")


class Issuer(EmbeddedIssuer):
    """The real CA, which can be told to refuse, and notes what it is asked."""

    def __init__(self, folder: Path) -> None:
        ca_files.init(folder, "cluster.local", START)
        super().__init__(folder)
        self.refuses = False
        self.issues_for: SpiffeId | None = None
        self.takes_s = 0.0
        """From signing to the answer's arrival."""
        self.extra_roots_pem = b""
        self.asked: list[tuple[float, SpiffeId]] = []

    async def issue(self, identity: SpiffeId, not_before: datetime, not_after: datetime) -> Issued:
        self.asked.append((trio.current_time(), identity))
        if self.refuses:
            raise MeshbpfError("ca-down", "the CA is out")
        issued = await super().issue(self.issues_for or identity, not_before, not_after)
        await trio.sleep(self.takes_s)
        return replace(issued, roots_pem=issued.roots_pem + self.extra_roots_pem)


class Clock:
    """The wall clock, tied to trio's."""

    def __init__(self) -> None:
        self.zero = trio.current_time()

    def now(self) -> datetime:
        return START + timedelta(seconds=trio.current_time() - self.zero)


@asynccontextmanager
async def stored(ttl: timedelta = TTL) -> AsyncIterator[tuple[CertificateStore, Issuer]]:
    async with trio.open_nursery() as nursery:
        with TemporaryDirectory() as folder:
            issuer, clock = Issuer(Path(folder)), Clock()
        yield CertificateStore(issuer, nursery, ttl=ttl, now=clock.now), issuer
        nursery.cancel_scope.cancel()


async def test_one_certificate_serves_all_pods_of_an_account(autojump_clock: MockClock) -> None:
    async with stored() as (store, issuer):
        store.hold(SHOP, "web/a")
        store.hold(SHOP, "web/b")
        first = await store.tls(SHOP)
        assert first is await store.tls(SHOP)
        assert first.identity == SHOP
        assert len(issuer.asked) == 1
        (cert,) = store.describe().certs
        assert (cert.state, cert.pods) == ("valid", ("web/a", "web/b"))
        assert cert.not_after == START + TTL
        assert int(cert.serial, 16) > 0


async def test_an_account_that_is_not_on_this_node_has_none(autojump_clock: MockClock) -> None:
    async with stored() as (store, issuer):
        store.hold(SHOP, "web/a")
        with pytest.raises(MeshbpfError, match=r"no pod of this node runs as .*/sa/stock"):
            await store.tls(STOCK)
        await store.tls(SHOP)
        assert [identity for _, identity in issuer.asked] == [SHOP]


async def test_renewal_at_half_life_gives_new_contexts_and_keeps_the_old_alive(
    autojump_clock: MockClock,
) -> None:
    async with stored() as (store, issuer):
        store.hold(SHOP, "web/a")
        old = await store.tls(SHOP)
        began = trio.current_time()
        await trio.sleep(TTL.total_seconds() / 2 - 1)
        assert await store.tls(SHOP) is old
        await trio.sleep(32)  # the wall clock is looked at every 30 s
        new = await store.tls(SHOP)
        assert new.server is not old.server
        assert new.not_after > old.not_after
        assert len(issuer.asked) == 2
        assert TTL.total_seconds() / 2 <= issuer.asked[1][0] - began <= TTL.total_seconds() / 2 + 31


async def test_a_refused_renewal_is_retried_with_growing_pauses_while_the_old_one_serves(
    autojump_clock: MockClock,
) -> None:
    async with stored() as (store, issuer):
        store.hold(SHOP, "web/a")
        old = await store.tls(SHOP)
        issuer.refuses = True
        await trio.sleep(TTL.total_seconds() * 0.9)
        assert await store.tls(SHOP) is old
        (cert,) = store.describe().certs
        assert cert.state == "renewing"
        assert cert.error is not None
        assert cert.error.code == "ca-down"
        times = [moment for moment, _ in issuer.asked[1:]]
        pauses = [b - a for a, b in pairwise(times)]
        assert pauses[0] < 1.3
        assert pauses[3] > 5
        assert max(pauses) <= 181
        issuer.refuses = False
        await trio.sleep(181)
        assert await store.tls(SHOP) is not old
        assert store.describe().certs[0].state == "valid"


async def test_one_that_could_not_be_renewed_is_refused_once_expired(
    autojump_clock: MockClock,
) -> None:
    async with stored() as (store, issuer):
        store.hold(SHOP, "web/a")
        await store.tls(SHOP)
        issuer.refuses = True
        await trio.sleep(TTL.total_seconds() + 1)
        with pytest.raises(MeshbpfError, match="has expired"):
            await store.tls(SHOP)
        assert store.describe().certs[0].state == "expired"
        # The last try came close to the end, however long the pauses had grown.
        assert any(
            math.isclose(moment, issuer.asked[0][0] + TTL.total_seconds(), abs_tol=150)
            for moment, _ in issuer.asked[1:]
        )


async def test_who_waits_for_a_first_certificate_hears_why_there_is_none(
    autojump_clock: MockClock,
) -> None:
    async with stored() as (store, issuer):
        issuer.refuses = True
        store.hold(SHOP, "web/a")
        with pytest.raises(MeshbpfError, match="the CA is out"):
            await store.tls(SHOP)
        assert store.describe().certs[0].state == "failed"
        issuer.refuses = False
        await trio.sleep(2)
        assert (await store.tls(SHOP)).identity == SHOP


async def test_giving_up_the_wait_disturbs_nobody(autojump_clock: MockClock) -> None:
    async with stored() as (store, _issuer):
        store.hold(SHOP, "web/a")
        with trio.CancelScope() as scope:
            scope.cancel()
            await store.tls(SHOP)
        assert scope.cancelled_caught
        assert (await store.tls(SHOP)).identity == SHOP


async def test_the_last_pod_takes_the_certificate_with_it(autojump_clock: MockClock) -> None:
    async with stored() as (store, issuer):
        store.hold(SHOP, "web/a")
        store.hold(SHOP, "web/b")
        await store.tls(SHOP)
        store.release(SHOP, "web/a")
        await store.tls(SHOP)
        store.release(SHOP, "web/b")
        assert store.describe().certs == ()
        with pytest.raises(MeshbpfError, match="no pod of this node"):
            await store.tls(SHOP)
        await trio.sleep(2 * TTL.total_seconds())
        assert len(issuer.asked) == 1


async def test_a_certificate_for_somebody_else_is_not_taken(autojump_clock: MockClock) -> None:
    async with stored() as (store, issuer):
        issuer.issues_for = STOCK
        store.hold(SHOP, "web/a")
        with pytest.raises(MeshbpfError, match=r"asked for .*shop, the CA answered .*stock"):
            await store.tls(SHOP)


async def test_a_ca_near_its_own_end_is_not_asked_in_a_busy_loop(
    autojump_clock: MockClock,
) -> None:
    async with stored(timedelta(days=5000)) as (store, issuer):
        store.hold(SHOP, "web/a")
        await store.tls(SHOP)
        end = START + ca.CA_LIFETIME
        assert store.describe().certs[0].not_after == end
        issuer.asked.clear()
        clock_left = ca.CA_LIFETIME.total_seconds()
        autojump_clock.jump(clock_left - 10)
        await trio.sleep(9.9)
        assert len(issuer.asked) <= 12


async def test_the_roots_are_told_by_fingerprint(autojump_clock: MockClock) -> None:
    async with stored() as (store, _issuer):
        (root,) = store.describe().roots
        assert len(bytes.fromhex(root)) == 32


async def test_each_says_which_root_it_leads_to(autojump_clock: MockClock) -> None:
    async with stored() as (store, _issuer):
        store.hold(SHOP, "web/a")
        assert store.describe().certs[0].root == ""
        await store.tls(SHOP)
        (cert,) = store.describe().certs
        assert (cert.root,) == store.describe().roots


async def test_a_change_while_one_is_fetched_asks_for_another(autojump_clock: MockClock) -> None:
    async with stored() as (store, issuer):
        issuer.takes_s = 5
        store.hold(SHOP, "web/a")
        await trio.sleep(1)
        # What is under way was signed by the CA of before.
        store.renew_all()
        first = await store.tls(SHOP)
        await trio.sleep(issuer.takes_s + HURRY_SPREAD_S + 1)
        assert len(issuer.asked) == 2
        assert await store.tls(SHOP) is not first
        await trio.sleep(60)
        assert len(issuer.asked) == 2


async def test_new_roots_that_come_with_a_certificate_renew_the_others(
    autojump_clock: MockClock,
) -> None:
    async with stored() as (store, issuer):
        store.hold(SHOP, "web/a")
        store.hold(STOCK, "web/b")
        await store.tls(SHOP)
        await store.tls(STOCK)
        issuer.asked.clear()
        issuer.extra_roots_pem = ca.create("cluster.local", START).roots_pem
        store.hold(OTHER, "web/c")
        await store.tls(OTHER)
        await trio.sleep(HURRY_SPREAD_S + 1)
        assert sorted(str(identity) for _, identity in issuer.asked) == sorted(
            map(str, (OTHER, SHOP, STOCK))
        )
        assert len(store.describe().roots) == 2
