"""Certificates by CertificateSigningRequests: asked for, waited for, refused, and cleared away."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from meshbpf.agent.config import Settings, kube_signer
from meshbpf.agent.core import ca
from meshbpf.agent.core.errors import ConfigError, MeshbpfError
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.runtime import file_signature, kubernetes_csr
from meshbpf.agent.runtime.certs import utc_now
from meshbpf.agent.runtime.kube_api import KubeApi
from meshbpf.agent.runtime.kubernetes_csr import KubernetesCsrIssuer
from tests.unit.kube.api_server import ApiServer, running

pytestmark = pytest.mark.xds

SIGNER = "example.com/mesh"
SHOP = SpiffeId("cluster.local", "web", "shop")
LIFE = timedelta(hours=2)


class Controller:
    """Approves and signs as a cluster's would, with a CA of its own."""

    def __init__(self) -> None:
        self.authority = ca.create("cluster.local", datetime.now(UTC))
        self.specs: list[dict[str, Any]] = []

    def sign(self, spec: dict[str, Any]) -> dict[str, Any]:
        self.specs.append(spec)
        csr = x509.load_pem_x509_csr(base64.b64decode(spec["request"]))
        san = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (identity,) = san.get_values_for_type(x509.UniformResourceIdentifier)
        key = csr.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        now = datetime.now(UTC)
        end = now + timedelta(seconds=spec["expirationSeconds"])
        chain = self.authority.issue(SpiffeId.parse(identity), key, now, end)
        return {
            "conditions": [{"type": "Approved", "status": "True"}],
            "certificate": base64.b64encode(chain).decode(),
        }


@asynccontextmanager
async def signer(folder: Path) -> AsyncIterator[tuple[ApiServer, Controller, KubernetesCsrIssuer]]:
    controller = Controller()
    (folder / "roots.pem").write_bytes(controller.authority.roots_pem)
    async with running(folder) as server:
        server.signs = controller.sign
        api = KubeApi(server.config())
        yield server, controller, KubernetesCsrIssuer(api, SIGNER, folder / "roots.pem", utc_now)


async def issue(issuer: KubernetesCsrIssuer, life: timedelta = LIFE) -> Any:
    now = utc_now()
    with trio.fail_after(10):
        return await issuer.issue(SHOP, now, now + life)


def requests(server: ApiServer) -> list[str]:
    return [name for kind, _, name in server.objects if kind == "CertificateSigningRequest"]


async def test_a_request_is_signed_and_nothing_of_it_stays(tmp_path: Path) -> None:
    async with signer(tmp_path) as (server, controller, issuer):
        issued = await issue(issuer)
        leaf = x509.load_pem_x509_certificate(issued.chain_pem)
        assert leaf.public_key() == issued.key.public_key()
        assert issued.roots_pem == controller.authority.roots_pem
        (spec,) = controller.specs
        assert spec["signerName"] == SIGNER
        assert set(spec["usages"]) == {"digital signature", "server auth", "client auth"}
        assert abs(spec["expirationSeconds"] - LIFE.total_seconds()) <= 1
        assert requests(server) == []


async def test_no_less_than_the_api_takes_is_asked_for(tmp_path: Path) -> None:
    async with signer(tmp_path) as (_server, controller, issuer):
        await issue(issuer, timedelta(seconds=30))
        assert controller.specs[0]["expirationSeconds"] == 600


async def test_a_denial_is_told_with_its_reason_and_cleared_away(tmp_path: Path) -> None:
    async with signer(tmp_path) as (server, _controller, issuer):
        denied = {"type": "Denied", "reason": "Policy", "message": "no pod of this node runs as it"}
        server.signs = lambda _spec: {"conditions": [denied]}
        with pytest.raises(MeshbpfError, match="denied: no pod of this node runs as it"):
            await issue(issuer)
        assert requests(server) == []


async def test_nobody_signs_and_the_wait_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes_csr, "SIGNED_S", 0.5)
    async with signer(tmp_path) as (server, _controller, issuer):
        server.signs = None
        with pytest.raises(MeshbpfError, match="was not approved and signed") as found:
            await issue(issuer)
        assert SIGNER in found.value.hint
        assert requests(server) == []


async def test_a_certificate_for_another_key_is_refused(tmp_path: Path) -> None:
    async with signer(tmp_path) as (server, controller, issuer):
        first = controller.sign

        def other(spec: dict[str, Any]) -> dict[str, Any]:
            from meshbpf.agent.core.csr import signing_request

            wrong = base64.b64encode(signing_request(SHOP, ca.new_key())).decode()
            return first(spec | {"request": wrong})

        server.signs = other
        with pytest.raises(MeshbpfError, match="it is for another key"):
            await issue(issuer)


async def test_roots_that_change_renew_and_bad_ones_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes_csr, "WATCH_S", 0.02)
    monkeypatch.setattr(file_signature, "SETTLE_S", 0.02)
    renewed = trio.Event()
    async with signer(tmp_path) as (_server, controller, issuer), trio.open_nursery() as nursery:
        nursery.start_soon(issuer.run, renewed.set)
        roots = tmp_path / "roots.pem"
        await trio.sleep(0.1)
        roots.write_text("nothing")
        with trio.fail_after(5):
            while not issuer.warnings():  # noqa: ASYNC110 (no event tells)
                await trio.sleep(0.02)
        assert issuer.roots_pem == controller.authority.roots_pem
        assert not renewed.is_set()
        both = controller.authority.roots_pem + ca.create("cluster.local", utc_now()).roots_pem
        roots.write_bytes(both)
        with trio.fail_after(5):
            await renewed.wait()
        assert (issuer.roots_pem, issuer.warnings()) == (both, ())
        nursery.cancel_scope.cancel()


def test_without_roots_there_is_no_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        KubernetesCsrIssuer(None, SIGNER, tmp_path / "none", utc_now)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("kubernetes-csr:example.com/mesh", "example.com/mesh"),
        (
            "kubernetes-csr:clusterissuers.cert-manager.io/mesh",
            "clusterissuers.cert-manager.io/mesh",
        ),
        ("kubernetes-csr:mesh", ""),
        ("kubernetes-csr:/mesh", ""),
        ("kubernetes-csr:example.com/", ""),
        ("https://istiod:15012", ""),
    ],
)
def test_a_signer_is_named_with_its_domain(text: str, name: str) -> None:
    assert kube_signer(text) == name
    if text.startswith("kubernetes-csr") and not name:
        with pytest.raises(ConfigError):
            Settings(node="n", state_dir=Path("/s"), ca=text, local_xds=Path("/x"))
