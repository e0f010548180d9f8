"""What a mesh of both kinds does beyond plain connections: meshbpf and ztunnel, both ways.

    make interop ZTUNNEL=PATH       (a build with `--features testing`)

Node 1 is meshbpf's and node 2 ztunnel's. Beside their captured pods each node
has some that are scripted here: a sidecar that speaks HBONE by itself, the
gateway of a network, an app that wants a PROXY header. test_ztunnel.py has the
plain connections.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.x509 import UniformResourceIdentifier

from tests.netns.talk import MARKER, echo, receive, receive_all
from tests.peers.certs import Credentials, Issuer
from tests.peers.hbone_peer import client_context, hbone_ask, hbone_server, server_context
from tests.peers.test_ztunnel import greeting
from tests.peers.ztunnel import Ztunnel, find_build
from tests.progs import server
from tests.progs.inside import socket_inside
from tests.progs.pod import NAMESPACE, Pod
from tests.testbed import MESHBPF, Testbed

pytestmark = [pytest.mark.peer, pytest.mark.root, pytest.mark.netns, pytest.mark.interop]

HBONE, GATE_PORT, TUNNEL_PORT = 15008, 15010, 15088
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Mixed:
    """The bed, with what its scripted peers need."""

    bed: Testbed
    root: Path
    issuer: Issuer
    files: Path

    def own(self, pod: Pod) -> Credentials:
        """A certificate of the mesh for a scripted peer."""
        return self.issuer.issue(self.files, pod.name, UniformResourceIdentifier(pod.identity))


def other(node: int) -> int:
    return 3 - node


def extend(bed: Testbed) -> None:
    """More of a mesh than the testbed's own: see the tests for what each record is for."""
    mesh = yaml.safe_load(bed.mesh_file.read_text())
    by_name = {each["name"]: each for each in mesh["workloads"]}
    services: list[dict[str, Any]] = []
    for node in (1, 2):
        proxied, sidecar, gate = (bed[f"n{node}{kind}"] for kind in "psg")
        by_name[proxied.name]["applicationTunnel"] = {"protocol": "PROXY", "port": TUNNEL_PORT}
        by_name[sidecar.name] |= {"protocol": "HBONE", "nativeTunnel": True}
        by_name[gate.name]["network"] = "far"
        pod = bed[f"n{node}a"]
        # The same pod seen from another network: without an address, behind the gateway.
        mesh["workloads"].append(
            by_name[pod.name]
            | {
                "uid": f"far//Pod/{NAMESPACE}/{pod.name}",
                "name": f"far-{pod.name}",
                "network": "far",
                "workloadIps": [],
                "services": {f"{NAMESPACE}/{far(node)}": {server.ECHO: server.ECHO}},
                "networkGateway": {
                    "destination": f"far/{gate.ipv4}",
                    "hboneMtlsPort": GATE_PORT,
                },
            }
        )
        services.append(
            {
                "name": f"far{node}",
                "namespace": NAMESPACE,
                "hostname": far(node),
                "vips": [f"/{far_vip(node)}"],
                "ports": {server.ECHO: server.ECHO},
                "subjectAltNames": [pod.identity],
            }
        )
        waypoint = bed[f"n{node}b"]
        services.append(
            {
                "name": f"guarded{node}",
                "namespace": NAMESPACE,
                "hostname": f"guarded{node}.mesh",
                "vips": [f"/{guarded_vip(node)}"],
                "ports": {server.WHOAMI: server.WHOAMI},
                "waypoint": {"destination": f"/{waypoint.ipv4}", "hboneMtlsPort": HBONE},
            }
        )
        by_name[bed[f"n{node}c"].name]["authorizationPolicies"] = [f"{NAMESPACE}/strict"]
    mesh["services"] += services
    mesh["policies"].append(
        {
            "name": "strict",
            "namespace": NAMESPACE,
            "scope": "WorkloadSelector",
            "action": "Deny",
            "dryRun": False,
            # As istiod sends STRICT mutual TLS.
            "rules": [[[{"notPrincipals": [{"Presence": []}]}]]],
        }
    )
    bed.mesh_file.write_text(yaml.safe_dump(mesh, sort_keys=False))


def far(node: int) -> str:
    return f"far{node}.mesh"


def far_vip(node: int) -> str:
    return f"198.19.100.{node}"


def guarded_vip(node: int) -> str:
    return f"198.19.101.{node}"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mixed]:
    build = find_build()
    if build is None or build.root_cert is None or build.root_key is None:
        pytest.skip("needs ZTUNNEL=PATH with its source tree, or ZTUNNEL_CA=DIR beside it")
    with Testbed("bni") as bed, Ztunnel(bed, 2, build) as ztunnel:
        for node in (1, 2):
            bed.add_pod(f"n{node}c", node, account="strict")
            bed.add_pod(f"n{node}p", node, account="proxied")
            bed.add_pod(f"n{node}s", node, account="sidecar", captured=False)
            bed.add_pod(f"n{node}g", node, account="gate", captured=False)
        extend(bed)
        files = ["--cert", str(build.root_cert), "--key", str(build.root_key)]
        bed.run(bed.node_netns(1), [str(MESHBPF), "ca", "import", str(bed.ca_dir), *files])
        ztunnel.start()
        bed.agents[1].start()
        bed.start_servers()
        for pod in bed.captured:
            (ztunnel if pod.node == 2 else bed.agents[1]).attach(pod)
        issuer = Issuer.load(build.root_cert, build.root_key)
        yield Mixed(bed, build.root_cert, issuer, tmp_path_factory.mktemp("interop"))


@pytest.fixture(params=[1, 2], ids=["by meshbpf", "by ztunnel"])
def node(request: pytest.FixtureRequest) -> int:
    """The node whose pod is the client; the other's pod is what it wants."""
    chosen: int = request.param
    return chosen


def tunnels(bed: Testbed, client: Pod, target: Pod) -> int:
    """TCP connections from one pod's namespace to the other's HBONE port."""
    words = ["ss", "-Htn", "state", "established", "dst", f"{target.ipv4}:{HBONE}"]
    return len(bed.run(client.netns, words).stdout.splitlines())


def test_concurrent_connections_share_one_tunnel(mixed: Mixed, node: int) -> None:
    bed = mixed.bed
    client, target = bed[f"n{node}b"], bed[f"n{other(node)}a"]
    with contextlib.ExitStack() as stack:
        for _ in range(30):
            sock = stack.enter_context(bed.connect(client, target.ipv4, server.ECHO))
            echo(sock)
        assert tunnels(bed, client, target) == 1


def test_each_half_is_closed_by_itself(mixed: Mixed, node: int) -> None:
    bed = mixed.bed
    client, target = bed[f"n{node}a"], bed[f"n{other(node)}a"]
    with bed.connect(client, target.ipv4, server.ECHO) as sock:
        sock.sendall(b"all of it")
        sock.shutdown(socket.SHUT_WR)
        assert receive_all(sock) == b"all of it"


def test_plaintext_is_refused_under_strict_and_hbone_is_not(mixed: Mixed, node: int) -> None:
    bed = mixed.bed
    target = bed[f"n{other(node)}c"]
    with bed.connect(bed[f"n{node}a"], target.ipv4, server.ECHO) as sock:
        echo(sock)
    outsider = bed[f"n{node}x"]
    assert greeting(bed, outsider, target.ipv4) == b""
    # The other pods of that node take it.
    with bed.connect(outsider, bed[f"n{other(node)}a"].ipv4, server.ECHO) as sock:
        echo(sock)


def test_an_app_tunnel_gets_a_proxy_header_with_address_and_identity(
    mixed: Mixed, node: int
) -> None:
    bed = mixed.bed
    client, target = bed[f"n{node}a"], bed[f"n{other(node)}p"]
    listener = socket_inside(target.netns, socket.AF_INET)
    with listener:
        listener.bind(("127.0.0.1", TUNNEL_PORT))
        listener.listen(8)
        listener.settimeout(10)
        with bed.connect(client, target.ipv4, 4321) as sock:
            app, _ = listener.accept()
            with app:
                app.settimeout(10)
                sock.sendall(b"hello")
                header = receive(app, 16)
                assert header[:14] == b"\r\n\r\n\0\r\nQUIT\n\x21\x11"
                body = receive(app, int.from_bytes(header[14:16], "big"))
                assert receive(app, 5) == b"hello"
    assert body[:8] == socket.inet_aton(client.ipv4) + socket.inet_aton(target.ipv4)
    assert int.from_bytes(body[10:12], "big") == 4321
    told = client.identity.encode()
    assert body[12:] == b"\xd0" + len(told).to_bytes(2, "big") + told


def test_a_waypoint_is_asked_for_the_services_own_address(mixed: Mixed, node: int) -> None:
    """The pod that plays the waypoint is the other kind's: it takes the VIP as authority."""
    bed = mixed.bed
    client, waypoint = bed[f"n{node}a"], bed[f"n{other(node)}b"]
    with bed.connect(client, guarded_vip(other(node)), server.WHOAMI) as sock:
        answer = receive_all(sock)
    assert waypoint.ipv4.encode() in answer
    assert client.ipv4.encode() in answer


def test_a_sidecars_native_hbone_is_reached(mixed: Mixed, node: int) -> None:
    bed = mixed.bed
    client, sidecar = bed[f"n{node}a"], bed[f"n{other(node)}s"]

    def dial(authority: str) -> socket.socket:
        sock = socket_inside(sidecar.netns, socket.AF_INET)
        sock.connect(("127.0.0.1", int(authority.rpartition(":")[2])))
        return sock

    context = server_context(mixed.root, mixed.own(sidecar))
    with hbone_server(sidecar.netns, (sidecar.ipv4, HBONE), context, dial) as seen:
        with bed.connect(client, sidecar.ipv4, server.ECHO) as sock:
            echo(sock)
            sock.shutdown(socket.SHUT_WR)
            assert receive_all(sock) == b""
        with bed.connect(client, sidecar.ipv4, server.ECHO) as sock:
            echo(sock)
        assert [one.authority for one in seen.asked] == [f"{sidecar.ipv4}:{server.ECHO}"] * 2
        assert seen.connections == 1
        (asked, _) = seen.asked
        assert client.ipv4 in asked.headers["forwarded"]
        assert f"k8s.namespace.name={NAMESPACE}" in asked.headers["baggage"]
        assert "x-forwarded-network" not in asked.headers


def test_a_sidecars_native_hbone_is_taken(mixed: Mixed, node: int) -> None:
    bed = mixed.bed
    sidecar, target = bed[f"n{node}s"], bed[f"n{other(node)}a"]
    context = client_context(mixed.root, mixed.own(sidecar))
    address = (target.ipv4, HBONE)
    # As Envoy writes it: no baggage, no forwarded, no trace.
    answer = hbone_ask(sidecar.netns, address, context, f"{target.ipv4}:{server.ECHO}", MARKER)
    assert answer == (200, MARKER)
    status, _ = hbone_ask(sidecar.netns, address, context, f"{target.ipv4}:9")
    assert status == 503
    status, _ = hbone_ask(sidecar.netns, address, context, f"{bed['n1x'].ipv4}:80")
    assert status == 400


def test_another_networks_pod_is_reached_through_its_gateway(mixed: Mixed, node: int) -> None:
    """Double HBONE: the client is one kind, the pod behind the gateway the other."""
    bed = mixed.bed
    far_node = other(node)
    client, target, gate = bed[f"n{node}a"], bed[f"n{far_node}a"], bed[f"n{far_node}g"]

    def dial(_: str) -> socket.socket:
        sock = socket_inside(gate.netns, socket.AF_INET)
        sock.connect((target.ipv4, HBONE))
        return sock

    context = server_context(mixed.root, mixed.own(gate))
    with hbone_server(gate.netns, (gate.ipv4, GATE_PORT), context, dial) as seen:
        for _ in range(2):
            with bed.connect(client, far_vip(far_node), server.ECHO, limit_s=10) as sock:
                echo(sock)
                sock.shutdown(socket.SHUT_WR)
                assert receive_all(sock) == b""
    authority = f"{far(far_node)}:{server.ECHO}"
    assert [one.authority for one in seen.asked] == [authority, authority]
    assert not any("x-forwarded-network" in one.headers for one in seen.asked)
    assert seen.connections == 1  # the outer tunnel is pooled, the inner ones are not


@pytest.mark.slow
def test_a_gibibyte_each_way_arrives_unharmed(mixed: Mixed, node: int) -> None:
    bed = mixed.bed
    client, target = bed[f"n{node}a"], bed[f"n{other(node)}a"]
    bed.client(client, "exchange", target.ipv4, server.EXCHANGE, "--bytes", str(GIB), limit_s=600.0)
