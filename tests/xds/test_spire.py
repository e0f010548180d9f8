"""Certificates from a SPIRE agent: pushed, rotated, missing, wrong, refused, away for a while."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import trio
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from meshbpf.agent.api import CertInfo
from meshbpf.agent.config import Settings, spire_socket
from meshbpf.agent.core import ca
from meshbpf.agent.core.errors import ConfigError, MeshbpfError
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.runtime import spire_issuer
from meshbpf.agent.runtime.certs import CertificateStore, utc_now
from meshbpf.agent.runtime.spire_issuer import SpireIssuer
from meshbpf.agent.waypoint_config import WaypointSettings
from tests.xds.conftest import eventually
from tests.xds.spire_agent import DOMAIN, SpireAgent, new_agent

pytestmark = pytest.mark.xds

SHOP = SpiffeId(DOMAIN, "web", "shop")
STOCK = SpiffeId(DOMAIN, "web", "stock")


@asynccontextmanager
async def storing(path: Path, trust_domain: str = DOMAIN) -> AsyncIterator[CertificateStore]:
    issuer = SpireIssuer(path, trust_domain, utc_now, random.Random(1))
    async with trio.open_nursery() as nursery:
        store = CertificateStore(issuer, nursery, ttl=timedelta(hours=1))
        nursery.start_soon(issuer.run, store.renew_all)
        yield store
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def both(folder: Path) -> AsyncIterator[tuple[SpireAgent, CertificateStore]]:
    agent = new_agent()
    path = folder / "admin.sock"
    async with agent.listening(path), storing(path) as store:
        yield agent, store


def shown(store: CertificateStore) -> CertInfo:
    (one,) = store.describe().certs
    return one


async def test_a_pushed_certificate_is_in_force_with_the_roots_of_its_trust_domain(
    tmp_path: Path,
) -> None:
    async with both(tmp_path) as (agent, store):
        agent.entry(SHOP)
        store.hold(SHOP, "web/a")
        store.hold(SHOP, "web/b")
        with trio.fail_after(5):
            tls = await store.tls(SHOP)
        assert tls.identity == SHOP
        assert agent.asked == [("web", "shop")]
        assert store.roots_pem == agent.authority.roots_pem  # far.example's are not among them
        one = shown(store)
        assert (one.state, one.renew_at, one.pods) == ("valid", None, ("web/a", "web/b"))
        assert one.root == store.describe().roots[0]


async def test_rotation_takes_effect_when_it_is_pushed(tmp_path: Path) -> None:
    async with both(tmp_path) as (agent, store):
        agent.entry(SHOP)
        store.hold(SHOP, "web/a")
        old = await store.tls(SHOP)
        serial = shown(store).serial
        agent.entry(SHOP)
        await eventually(lambda: shown(store).serial != serial, 5)
        assert (await store.tls(SHOP)).server is not old.server
        assert store.statistics().issued == 2
        agent.push()  # the same once more
        await trio.sleep(0.1)
        assert store.statistics().issued == 2
        assert agent.asked == [("web", "shop")]


async def test_a_new_bundle_counts_for_certificates_that_stay(tmp_path: Path) -> None:
    async with both(tmp_path) as (agent, store):
        agent.entry(SHOP)
        store.hold(SHOP, "web/a")
        old = await store.tls(SHOP)
        serial = shown(store).serial
        second = ca.create(DOMAIN, utc_now())
        agent.trust(agent.authority, second)
        await eventually(lambda: len(store.describe().roots) == 2, 5)
        assert store.roots_pem == agent.authority.roots_pem + second.roots_pem
        new = await store.tls(SHOP)
        assert new.client is not old.client
        assert shown(store).serial == serial


async def test_a_missing_entry_is_told_with_the_command_that_creates_it(tmp_path: Path) -> None:
    async with both(tmp_path) as (agent, store):
        store.hold(SHOP, "web/a")
        with trio.fail_after(5), pytest.raises(MeshbpfError, match="no registration entry") as got:
            await store.tls(SHOP)
        assert "spire-server entry create -spiffeID spiffe://example.org/ns/web/sa/shop " in (
            got.value.hint
        )
        assert "-selector k8s:ns:web -selector k8s:sa:shop" in got.value.hint
        assert shown(store).state == "failed"
        agent.entry(SHOP)  # no new subscription is needed
        await eventually(lambda: shown(store).state == "valid", 5)
        assert agent.asked == [("web", "shop")]
        agent.svids.clear()
        agent.push()
        await eventually(lambda: shown(store).state == "renewing", 5)
        assert (await store.tls(SHOP)).identity == SHOP  # to its end


async def test_of_several_entries_the_one_asked_for_counts(tmp_path: Path) -> None:
    async with both(tmp_path) as (agent, store):
        everyone = SpiffeId(DOMAIN, "web", "everyone")
        agent.svids["web", "shop"] = [agent.svid(everyone), agent.svid(SHOP)]
        store.hold(SHOP, "web/a")
        with trio.fail_after(5):
            assert (await store.tls(SHOP)).identity == SHOP
        agent.svids["web", "stock"] = [agent.svid(everyone)]
        store.hold(STOCK, "web/b")
        with trio.fail_after(5), pytest.raises(MeshbpfError, match=r"it has .*/sa/everyone"):
            await store.tls(STOCK)


async def test_a_certificate_for_another_id_than_is_said_is_refused(tmp_path: Path) -> None:
    async with both(tmp_path) as (agent, store):
        agent.svids["web", "shop"] = [agent.svid(STOCK, shown=SHOP)]
        store.hold(SHOP, "web/a")
        with trio.fail_after(5), pytest.raises(MeshbpfError, match=r"answered .*/sa/stock"):
            await store.tls(SHOP)


async def test_a_key_that_is_not_the_certificates_is_refused(tmp_path: Path) -> None:
    async with both(tmp_path) as (agent, store):
        one = agent.svid(SHOP)
        one.x509_svid_key = agent.svid(SHOP).x509_svid_key
        agent.svids["web", "shop"] = [one]
        store.hold(SHOP, "web/a")
        with trio.fail_after(5), pytest.raises(MeshbpfError, match="it is for another key"):
            await store.tls(SHOP)


async def test_an_rsa_key_is_refused_with_the_agents_setting(tmp_path: Path) -> None:
    async with both(tmp_path) as (agent, store):
        one = agent.svid(SHOP)
        one.x509_svid_key = rsa.generate_private_key(65537, 2048).private_bytes(
            serialization.Encoding.DER,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        agent.svids["web", "shop"] = [one]
        store.hold(SHOP, "web/a")
        with trio.fail_after(5), pytest.raises(MeshbpfError) as got:
            await store.tls(SHOP)
        assert "workload_x509_svid_key_type" in got.value.hint


async def test_while_the_socket_is_gone_the_certificate_stays_and_then_is_followed_again(
    tmp_path: Path,
) -> None:
    agent = new_agent()
    agent.entry(SHOP)
    path = tmp_path / "admin.sock"
    async with storing(path) as store:
        store.hold(SHOP, "web/a")
        with trio.fail_after(5), pytest.raises(MeshbpfError, match="cannot connect"):
            await store.tls(SHOP)  # before spire-agent is there at all
        async with agent.listening(path):
            await eventually(lambda: shown(store).state == "valid", 5)
            serial = shown(store).serial
        await eventually(lambda: shown(store).state == "renewing", 5)
        assert (await store.tls(SHOP)).identity == SHOP
        assert len(store.warnings()) == 2  # of the certificate and of the roots
        agent.entry(SHOP)
        async with agent.listening(path):
            await eventually(lambda: shown(store).state == "valid", 5)
            assert shown(store).serial != serial
            await eventually(lambda: store.warnings() == [], 5)


async def test_a_denial_says_who_must_be_an_authorized_delegate(tmp_path: Path) -> None:
    async with both(tmp_path) as (agent, store):
        agent.refusal = (7, "caller not configured as an authorized delegate")
        store.hold(SHOP, "web/a")
        with trio.fail_after(5), pytest.raises(MeshbpfError, match="PERMISSION_DENIED") as got:
            await store.tls(SHOP)
        assert "must be in authorized_delegates" in got.value.hint
        agent.refusal = None
        agent.entry(SHOP)
        await eventually(lambda: shown(store).state == "valid", 10)


async def test_an_agent_that_has_nothing_signed_yet_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spire_issuer, "FIRST_ANSWER_S", 0.2)
    async with both(tmp_path) as (agent, store):
        agent.silent = True
        agent.entry(SHOP)
        store.hold(SHOP, "web/a")
        with trio.fail_after(5), pytest.raises(MeshbpfError, match=r"did not answer .* in 0.2 s"):
            await store.tls(SHOP)
        agent.silent = False
        await eventually(lambda: shown(store).state == "valid", 5)


async def test_the_subscription_ends_with_the_last_pod(tmp_path: Path) -> None:
    async with both(tmp_path) as (agent, store):
        agent.entry(SHOP)
        store.hold(SHOP, "web/a")
        await store.tls(SHOP)
        (call,) = agent.subscriptions
        assert call.reset_code is None
        store.release(SHOP, "web/a")
        await eventually(lambda: call.reset_code == 8, 5)  # CANCEL, RFC 9113, section 7
        assert store.describe().certs == ()


async def test_other_trust_domains_are_told_and_not_asked_for(tmp_path: Path) -> None:
    async with both(tmp_path) as (agent, store):
        far = SpiffeId("far.example", "web", "shop")
        store.hold(far, "web/a")
        with trio.fail_after(5), pytest.raises(MeshbpfError, match="not of trust domain") as got:
            await store.tls(far)
        assert "--trust-domain" in got.value.hint
        assert agent.asked == []


async def test_roots_of_no_such_trust_domain_are_told(tmp_path: Path) -> None:
    agent = new_agent()
    path = tmp_path / "admin.sock"
    here = SpiffeId("cluster.local", "web", "shop")
    agent.svids["web", "shop"] = [agent.svid(here)]
    async with agent.listening(path), storing(path, "cluster.local") as store:
        store.hold(here, "web/a")
        with trio.fail_after(5), pytest.raises(MeshbpfError, match=r"but of example\.org, far"):
            await store.tls(here)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("spire:/run/spire/admin.sock", "/run/spire/admin.sock"),
        ("spire:run/spire/admin.sock", None),
        ("spire:/", None),
        ("spire:", None),
        ("https://ca:1", None),
    ],
)
def test_the_socket_is_named_by_its_absolute_path(text: str, path: str | None) -> None:
    found = spire_socket(text)
    assert (str(found) if found else None) == path
    if text.startswith("spire"):
        if path is None:
            with pytest.raises(ConfigError, match="absolute path"):
                Settings("node", Path("/x"), ca=text)
        else:
            assert Settings("node", Path("/x"), ca=text).ca == text


def test_a_waypoint_takes_no_certificate_from_spire(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kubernetes-csr:SIGNER"):
        WaypointSettings(
            name="waypoint",
            namespace="web",
            service_account="waypoint",
            state_dir=tmp_path,
            addresses=(),
            ca="spire:/run/spire/admin.sock",
            kubernetes=True,
        )
