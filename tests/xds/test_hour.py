"""Long times, simulated: an hour without istiod, ends of certificates, new roots."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, memory_stream_pair

from meshbpf.agent.core import ca
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.xds import ADDRESS, Ending
from meshbpf.agent.runtime.certs import CertificateStore
from meshbpf.agent.runtime.control_plane import ControlPlane, UnreachableError
from meshbpf.agent.runtime.grpc_client import Channel, open_channel
from meshbpf.agent.runtime.istiod_issuer import IstiodIssuer
from meshbpf.agent.runtime.mesh import LiveMesh
from meshbpf.agent.runtime.xds_source import XdsSource
from meshbpf.agent.wire import istio_ca, xds
from tests.unit.runtime.grpc_server import Connection
from tests.xds import records
from tests.xds.conftest import NODE
from tests.xds.istiod import TOKEN, Istiod

# The clock has to be asked for by each test itself, or time is the real one.
pytestmark = pytest.mark.xds
START = datetime(2026, 5, 1, tzinfo=UTC)
WEB = SpiffeId("cluster.local", "shop", "web")
DB = SpiffeId("cluster.local", "shop", "db")


class World:
    """A control plane at the other end of memory streams, under trio's own clock."""

    def __init__(self, directory: Path, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.zero = trio.current_time()
        self.istiod = Istiod(directory, ca.create("cluster.local", START))
        self.istiod.now = self.now
        self.istiod.token_file.write_text(TOKEN)
        self.istiod.root_file.write_bytes(self.istiod.authority.roots_pem)
        self.up = True
        self.dials = 0
        self.cut = trio.Event()

    def now(self) -> datetime:
        return START + timedelta(seconds=trio.current_time() - self.zero)

    def go_down(self) -> None:
        self.up = False
        self.cut.set()
        self.cut = trio.Event()

    def plane(self) -> ControlPlane:
        world = self

        class Plane(ControlPlane):
            @asynccontextmanager
            async def channel(self) -> AsyncIterator[Channel]:
                async with world.connection() as channel:
                    yield channel

            async def metadata(self) -> list[tuple[str, str]]:
                # Without the thread that reads the file: time would jump meanwhile.
                return [("authorization", f"Bearer {TOKEN}"), ("clusterid", "Kubernetes")]

        one = self.istiod.plane()
        return Plane(one.host, one.port, one.root, one.name, one.token, one.cluster_id)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Channel]:
        self.dials += 1
        if not self.up:
            raise UnreachableError("control-plane-unreachable", "it is down")
        ours, theirs = memory_stream_pair()
        handlers = {
            xds.METHOD: self.istiod.discovery,
            istio_ca.METHOD: self.istiod.certificate,
        }

        async def cut(event: trio.Event) -> None:
            await event.wait()
            await trio.aclose_forcefully(theirs)
            await trio.aclose_forcefully(ours)

        self.nursery.start_soon(Connection(theirs, handlers, {}).serve)
        self.nursery.start_soon(cut, self.cut)
        async with open_channel(ours, "istiod") as channel:
            yield channel


@pytest.fixture
async def world(tmp_path: Path, nursery: trio.Nursery) -> World:
    return World(tmp_path, nursery)


async def test_an_hour_without_istiod_leaves_the_mesh_as_it_was(
    world: World, autojump_clock: MockClock
) -> None:
    # A push is read in a thread: time must not jump while that is awaited.
    autojump_clock.autojump_threshold = 0.3
    world.istiod.put(ADDRESS, records.uid("web"), records.workload("web", "10.0.0.1"))
    source, mesh = XdsSource(world.plane(), NODE, rng=random.Random(1)), LiveMesh(trio.Lock())
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: source.watch(mesh, task_status=task_status))
        before = mesh.snapshot
        assert len(before.workloads) == 1
        world.go_down()
        dials = world.dials
        autojump_clock.autojump_threshold = 0
        await trio.sleep(3600)
        autojump_clock.autojump_threshold = 0.3
        assert mesh.snapshot is before
        assert source.healthy
        assert source.error is not None
        # At most once in 15 s less jitter, and at least once in 15 s plus jitter.
        assert 3600 / 18 <= world.dials - dials <= 3600 / 12 + 12
        assert source.terminations[Ending.CONNECTION_ERROR] >= 200
        world.up = True
        world.istiod.put(ADDRESS, records.uid("db"), records.workload("db", "10.0.0.2"))
        await trio.sleep(20)
        assert len(mesh.snapshot.workloads) == 2
        assert source.error is None
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def certified(world: World, *, impersonates: bool = True) -> AsyncIterator[CertificateStore]:
    async with trio.open_nursery() as nursery:
        issuer = IstiodIssuer(world.plane(), world.now, impersonates=impersonates, watch_s=20)
        store = CertificateStore(
            issuer, nursery, ttl=timedelta(hours=1), now=world.now, rng=random.Random(1)
        )
        nursery.start_soon(issuer.run, store.renew_all)
        yield store
        nursery.cancel_scope.cancel()


async def test_a_certificate_is_renewed_at_half_its_life(
    world: World, autojump_clock: MockClock
) -> None:
    async with certified(world) as store:
        store.hold(WEB, "shop/web")
        first = await store.tls(WEB)
        assert first.identity == WEB
        assert first.not_after == START + timedelta(hours=1)
        await trio.sleep(29 * 60)
        assert await store.tls(WEB) is first
        await trio.sleep(2 * 60)
        assert (await store.tls(WEB)).not_after > first.not_after
        assert world.istiod.asked == [str(WEB)] * 2


async def test_a_waypoint_asks_for_itself_and_gets_no_other_certificate(
    world: World, autojump_clock: MockClock
) -> None:
    world.istiod.accounts[TOKEN] = str(WEB)
    async with certified(world, impersonates=False) as store:
        store.hold(WEB, "shop/waypoint")
        assert (await store.tls(WEB)).identity == WEB
        other = replace(WEB, service_account="other")
        store.hold(other, "shop/waypoint")
        with pytest.raises(MeshbpfError, match="another identity") as caught:
            await store.tls(other)
        assert caught.value.hint.startswith("the token must be of this very account")


async def test_with_the_ca_down_the_old_certificate_serves_to_its_end_and_is_replaced_after(
    world: World, autojump_clock: MockClock
) -> None:
    async with certified(world) as store:
        store.hold(WEB, "shop/web")
        first = await store.tls(WEB)
        world.go_down()
        await trio.sleep(59 * 60)
        assert await store.tls(WEB) is first
        (cert,) = store.describe().certs
        assert cert.state == "renewing"
        await trio.sleep(2 * 60)
        with pytest.raises(MeshbpfError, match="has expired"):
            await store.tls(WEB)
        world.up = True
        await trio.sleep(200)
        assert (await store.tls(WEB)).not_after > first.not_after


async def test_a_refusal_of_the_ca_names_what_to_check(
    world: World, autojump_clock: MockClock
) -> None:
    world.istiod.tokens = {"another"}
    async with certified(world) as store:
        store.hold(WEB, "shop/web")
        with pytest.raises(MeshbpfError, match="UNAUTHENTICATED") as caught:
            await store.tls(WEB)
        assert "CA_TRUSTED_NODE_ACCOUNTS" in caught.value.hint


async def test_a_certificate_of_another_identity_is_not_taken(
    world: World, autojump_clock: MockClock
) -> None:
    real = world.istiod.authority.issue
    world.istiod.authority = _Mistaken(world.istiod.authority, real)  # type: ignore[assignment]
    async with certified(world) as store:
        store.hold(WEB, "shop/web")
        with pytest.raises(MeshbpfError, match="the CA answered"):
            await store.tls(WEB)


class _Mistaken:
    def __init__(self, authority: ca.CertificateAuthority, issue: object) -> None:
        self.roots_pem = authority.roots_pem
        self._issue = issue

    def issue(self, _identity: SpiffeId, *rest: object) -> bytes:
        return self._issue(DB, *rest)  # type: ignore[operator, no-any-return]


async def test_new_roots_count_for_every_identity_and_all_certificates_are_renewed(
    world: World, autojump_clock: MockClock
) -> None:
    async with certified(world) as store:
        store.hold(WEB, "shop/web")
        store.hold(DB, "shop/db")
        before = {one: await store.tls(one) for one in (WEB, DB)}
        old = store.roots_pem
        fresh = ca.create("cluster.local", START)
        world.istiod.roots_pem = old + fresh.roots_pem
        world.istiod.authority = fresh
        world.istiod.root_file.write_bytes(old + fresh.roots_pem)
        await trio.sleep(30)
        assert store.roots_pem == old + fresh.roots_pem
        assert len(store.describe().roots) == 2
        after = {one: await store.tls(one) for one in (WEB, DB)}
        assert all(after[one] is not before[one] for one in (WEB, DB))
        # Not again and again: one renewal for the file, one for the bundle at most.
        assert len(world.istiod.asked) <= 6
        await trio.sleep(600)
        assert len(world.istiod.asked) <= 6


async def test_eight_certificates_are_fetched_at_a_time_and_a_waiting_connection_comes_first(
    world: World, autojump_clock: MockClock
) -> None:
    world.istiod.signing_takes_s = 1.0
    many = [SpiffeId("cluster.local", "shop", f"sa-{number}") for number in range(20)]
    async with certified(world) as store:
        for identity in many:
            store.expect(identity, f"uid-{identity.service_account}")
            await trio.sleep(0.01)  # so that they come in this order
        assert len(world.istiod.asked) == 8
        last = many[-1]
        await store.tls(last)
        assert str(last) in world.istiod.asked[8:16], "it was the last to come"
        await trio.sleep(5)
        assert len(world.istiod.asked) == 20


async def test_an_identity_is_forgotten_with_its_last_workload_and_pod(
    world: World, autojump_clock: MockClock
) -> None:
    async with certified(world) as store:
        store.expect(WEB, "uid-1")
        store.hold(WEB, "shop/web")
        await store.tls(WEB)
        store.forget(WEB, "uid-1")
        assert [cert.identity for cert in store.describe().certs] == [str(WEB)]
        store.release(WEB, "shop/web")
        assert store.describe().certs == ()
