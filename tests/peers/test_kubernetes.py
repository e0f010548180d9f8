"""Mesh state from a real kube-apiserver, with the rights that the chart gives and no others."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from meshbpf.agent.core import ca
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.kube_cluster import Cluster
from meshbpf.agent.core.state import MeshDelta, MeshState
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import TunnelProtocol
from meshbpf.agent.runtime import kube_config
from meshbpf.agent.runtime.certs import utc_now
from meshbpf.agent.runtime.kube_api import KubeApi
from meshbpf.agent.runtime.kube_status import StatusReporter
from meshbpf.agent.runtime.kubernetes import KubernetesSource
from meshbpf.agent.runtime.kubernetes_csr import KubernetesCsrIssuer
from meshbpf.agent.wire.tls import workload_tls
from tests.peers.kube_apiserver import CRDS, KubeApiServer, api_server, missing
from tests.progs.kube_objects import mesh_objects, pod_object
from tests.progs.pod import NAMESPACE, Pod
from tests.testbed import ROOT

pytestmark = pytest.mark.peer

A = Pod("a", "", 1, 1, "shop", captured=True)
B = Pod("b", "", 2, 1, "stock", captured=True)
REDIRECTION = "ambient.istio.io/redirection"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeApiServer]:
    if reason := missing():
        pytest.skip(reason)
    with api_server(tmp_path_factory.mktemp("kube")) as server:
        for group, kinds in CRDS.items():
            for kind, plural in kinds.items():
                server.add_kind(group, kind, plural)
        chart = ROOT / "packaging" / "helm" / "meshbpf" / "templates" / "clusterrole.yaml"
        text = chart.read_text()
        rules = yaml.safe_load(text[text.index("rules:") : text.index("\n---")])["rules"]
        server.grant("meshbpf", rules)
        server.apply(*(each for each in mesh_objects([A, B]) if usable(each)))
        yield server


def usable(body: dict[str, Any]) -> bool:
    """Its virtual addresses would have to lie in the server's own range."""
    if body["kind"] == "Service":
        for key in ("clusterIP", "clusterIPs"):
            body["spec"].pop(key)
    return True


class Mesh:
    def __init__(self) -> None:
        self.states: list[MeshState] = []

    async def apply(self, state: MeshState) -> None:
        self.states.append(state)

    async def apply_delta(self, delta: MeshDelta) -> None:
        mesh = Snapshot.EMPTY.after(MeshDelta.whole(self.states[-1]), 1).after(delta, 2)
        self.states.append(
            MeshState(tuple(mesh.workloads), tuple(mesh.services), tuple(mesh.policies))
        )

    def names(self) -> list[str]:
        return sorted(each.name for each in self.states[-1].workloads)

    def hbone(self) -> list[str]:
        protocol = TunnelProtocol.HBONE
        found = (w.name for w in self.states[-1].workloads if w.tunnel_protocol is protocol)
        return sorted(found)


@asynccontextmanager
async def following(server: KubeApiServer) -> AsyncIterator[tuple[KubernetesSource, Mesh]]:
    config = kube_config.of_file(server.agent_kubeconfig)
    source, mesh = KubernetesSource(KubeApi(config), Cluster()), Mesh()
    async with trio.open_nursery() as nursery:
        with trio.fail_after(60):
            await nursery.start(source.watch, mesh)
        yield source, mesh
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], object], limit_s: float = 60.0) -> None:
    with trio.fail_after(limit_s):
        while not condition():  # noqa: ASYNC110 (a state has no event)
            await trio.sleep(0.05)


async def run(function: Callable[..., Any], *args: Any) -> Any:
    return await trio.to_thread.run_sync(function, *args)


async def test_what_kubectl_applies_is_the_mesh_a_moment_later(server: KubeApiServer) -> None:
    async with following(server) as (source, mesh):
        assert mesh.names() == ["a", "b"]
        assert source.healthy
        (service,) = [each for each in mesh.states[-1].services if each.name == "a"]
        assert service.addresses
        policy = {
            "apiVersion": "security.istio.io/v1",
            "kind": "AuthorizationPolicy",
            "metadata": {"name": "p", "namespace": NAMESPACE},
            "spec": {"action": "DENY", "rules": [{"to": [{"operation": {"ports": ["80"]}}]}]},
        }
        await run(server.apply, policy)
        await until(lambda: mesh.states[-1].policies)
        extra = Pod("c", "", 2, 3, "stock", captured=True)
        await run(server.apply, pod_object(extra))
        await until(lambda: mesh.names() == ["a", "b", "c"])
        await run(server.kubectl, "delete", "pod", "c", "-n", NAMESPACE, "--grace-period=0",
                  "--force")  # fmt: skip
        await until(lambda: mesh.names() == ["a", "b"])
        assert source.warnings() == ()


async def test_the_annotation_is_written_with_the_charts_rights_and_read_back(
    server: KubeApiServer,
) -> None:
    async with following(server) as (source, mesh):
        steered = {A.key}
        reporter = StatusReporter(source, "node1", lambda: steered)
        await reporter.look()
        assert (await run(server.annotations, NAMESPACE, "a"))[REDIRECTION] == "enabled"
        await until(lambda: mesh.hbone() == ["a"])
        steered.clear()
        await reporter.look()
        assert REDIRECTION not in await run(server.annotations, NAMESPACE, "a")


async def test_a_signer_of_the_cluster_issues_certificates(
    server: KubeApiServer, tmp_path: Path
) -> None:
    """The test is approver and signing controller; the rights are those that the docs name."""
    rule = {
        "apiGroups": ["certificates.k8s.io"],
        "resources": ["certificatesigningrequests"],
        "verbs": ["create", "get", "delete"],
    }
    await run(server.grant, "meshbpf-csr", [rule])
    authority = ca.create("cluster.local", utc_now())
    roots = tmp_path / "roots.pem"
    roots.write_bytes(authority.roots_pem)
    api = KubeApi(kube_config.of_file(server.agent_kubeconfig))
    issuer = KubernetesCsrIssuer(api, "example.com/mesh", roots, utc_now)
    identity = SpiffeId("cluster.local", "shop", "web")

    def sign() -> bool:
        items = json.loads(server.kubectl("get", "csr", "-o", "json").stdout)["items"]
        for one in items:
            server.kubectl("certificate", "approve", one["metadata"]["name"])
            csr = x509.load_pem_x509_csr(base64.b64decode(one["spec"]["request"]))
            key = csr.public_key()
            assert isinstance(key, ec.EllipticCurvePublicKey)
            now = utc_now()
            chain = authority.issue(identity, key, now, now + timedelta(hours=1))
            status = {"status": {"certificate": base64.b64encode(chain).decode()}}
            server.kubectl(
                "patch", "csr", one["metadata"]["name"], "--subresource=status", "--type=merge",
                "-p", json.dumps(status),
            )  # fmt: skip
        return bool(items)

    async def controller() -> None:
        while not await run(sign):  # noqa: ASYNC110 (another process changes it)
            await trio.sleep(0.1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(controller)
        now = utc_now()
        issued = await issuer.issue(identity, now, now + timedelta(hours=1))
    tls = workload_tls(issued.chain_pem, issued.key, issued.roots_pem)
    assert tls.identity == identity
    left = await run(server.kubectl, "get", "csr", "-o", "json")
    assert json.loads(left.stdout)["items"] == []


async def test_a_restart_of_the_server_is_ridden_out(server: KubeApiServer) -> None:
    async with following(server) as (source, mesh):
        await run(server.stop_server)
        await until(lambda: source.warnings())
        assert mesh.names() == ["a", "b"]
        await run(server.start_server)
        await run(server.apply, pod_object(Pod("d", "", 2, 4, "stock", captured=True)))
        await until(lambda: mesh.names() == ["a", "b", "d"])
        await until(lambda: source.warnings() == ())
