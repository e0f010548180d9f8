"""Clients on other people's HTTP/2 open HBONE tunnels into a captured pod, or are refused.

With ZTUNNEL=PATH all of it runs against a ztunnel too: the refusals that we
state are then shown to be the ones that it gives.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.x509 import DNSName, GeneralName, UniformResourceIdentifier

from tests.peers.certs import Credentials, Issuer
from tests.peers.clients import Answer, Http2Client, go_client, node_client
from tests.peers.ztunnel import Ztunnel, find_build
from tests.progs.pod import TRUST_DOMAIN, Pod
from tests.progs.server import ECHO
from tests.testbed import MESHBPF, Testbed

pytestmark = [pytest.mark.peer, pytest.mark.root, pytest.mark.netns]

BODY = os.urandom(1 << 20)
CLOSED_PORT = 9


@dataclass(frozen=True, slots=True)
class Server:
    """A pod of node 2 behind an HBONE listener, and the CA that this listener trusts."""

    bed: Testbed
    pod: Pod
    root: Path
    issuer: Issuer
    directory: Path

    @property
    def caller(self) -> Pod:
        """Not captured, so that its packets reach port 15008 as they are."""
        return self.bed["n1x"]

    def accepted(self) -> int:
        return len(self.bed.servers[self.pod.name].events("accepted"))


@pytest.fixture(scope="module", params=["meshbpf", "ztunnel"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    build = find_build()
    if request.param == "ztunnel" and (build is None or build.root_key is None):
        pytest.skip("needs ZTUNNEL=PATH with its source tree, or ZTUNNEL_CA=DIR beside it")
    with Testbed("bnh") as bed, contextlib.ExitStack() as stack:
        pod = bed["n2a"]
        bed.start_servers(pod)
        if request.param == "meshbpf":
            command = [str(MESHBPF), "ca", "init", str(bed.ca_dir), "--trust-domain", TRUST_DOMAIN]
            bed.run(bed.node_netns(2), command)
            bed.agents[2].start()
            bed.agents[2].attach(pod)
            root, cert, key = (
                bed.ca_dir / name for name in ("root-cert.pem", "ca-cert.pem", "ca-key.pem")
            )
        else:
            assert build is not None
            assert build.root_cert is not None
            assert build.root_key is not None
            ztunnel = stack.enter_context(Ztunnel(bed, 2, build))
            ztunnel.start()
            ztunnel.attach(pod)
            root, cert, key = build.root_cert, build.root_cert, build.root_key
        yield Server(bed, pod, root, Issuer.load(cert, key), tmp_path_factory.mktemp("peers"))


@pytest.fixture(scope="module", params=[node_client, go_client], ids=["node", "go"])
def client(request: pytest.FixtureRequest) -> Http2Client:
    make: Callable[[], Http2Client | None] = request.param
    made = make()
    if made is None:
        pytest.skip(f"{make.__name__}: no such program on this machine")
    return made


@pytest.fixture(scope="module")
def right(server: Server) -> Credentials:
    """A certificate of the caller's own identity, by the CA that the listener trusts."""
    identity = UniformResourceIdentifier(server.caller.identity)
    return server.issuer.issue(server.directory, "right", identity)


def tunnel(
    server: Server,
    client: Http2Client,
    credentials: Credentials | None,
    authority: str = "",
    method: str = "CONNECT",
) -> Answer:
    pod = server.pod
    return client.ask(
        server.caller.netns,
        pod.ipv4,
        authority or f"{pod.ipv4}:{ECHO}",
        root=server.root,
        credentials=credentials,
        send=BODY,
        method=method,
    )


@pytest.mark.parametrize("family", [4, 6])
def test_right_certificate_gets_its_bytes_echoed(
    server: Server, client: Http2Client, right: Credentials, family: int
) -> None:
    address = server.pod.ipv4 if family == 4 else server.pod.ipv6
    authority = f"{address}:{ECHO}" if family == 4 else f"[{address}]:{ECHO}"
    answer = client.ask(
        server.caller.netns, address, authority, root=server.root, credentials=right, send=BODY
    )
    assert answer.error is None
    assert answer.status == 200
    assert answer.received == BODY
    assert answer.alpn == "h2"
    assert answer.peer == server.pod.identity


def wrong(server: Server, kind: str) -> Credentials:
    """A certificate that must not open a tunnel."""
    identity = UniformResourceIdentifier(server.caller.identity)
    sans: dict[str, GeneralName] = {
        "foreign root": identity,
        "foreign trust domain": UniformResourceIdentifier("spiffe://elsewhere/ns/apps/sa/legacy"),
        "dns name": DNSName("legacy.apps.svc.cluster.local"),
        "uri of no spiffe id": UniformResourceIdentifier("https://cluster.local/ns/apps/sa/legacy"),
    }
    issuer = Issuer.foreign(server.issuer) if kind == "foreign root" else server.issuer
    return issuer.issue(server.directory, kind.replace(" ", "-"), sans[kind])


@pytest.mark.parametrize(
    "kind", ["none", "foreign root", "foreign trust domain", "dns name", "uri of no spiffe id"]
)
def test_wrong_certificate_fails_in_tls_and_reaches_nobody(
    server: Server, client: Http2Client, kind: str
) -> None:
    credentials = None if kind == "none" else wrong(server, kind)
    before = server.accepted()
    answer = tunnel(server, client, credentials)
    assert answer.error is not None
    assert answer.status is None
    assert answer.received == b""
    assert answer.alpn == "h2", "the client's side of the handshake went well"
    assert server.accepted() == before


@pytest.mark.parametrize(
    ("authority", "status"),
    [
        ("nonsense", 400),
        ("{ip}", 400),
        ("{ip}:99999", 400),
        ("198.18.2.2:{port}", 400),
        ("no-such.apps.svc.cluster.local:{port}", 503),
        ("{ip}:15008", 503),
        ("{ip}:{closed}", 503),
    ],
)
def test_bad_authority_is_answered_with_its_status(
    server: Server, client: Http2Client, right: Credentials, authority: str, status: int
) -> None:
    text = authority.format(ip=server.pod.ipv4, port=ECHO, closed=CLOSED_PORT)
    before = server.accepted()
    assert tunnel(server, client, right, text).status == status
    assert server.accepted() == before


def test_another_method_than_connect_is_answered_with_400(
    server: Server, client: Http2Client, right: Credentials
) -> None:
    assert tunnel(server, client, right, method="GET").status == 400
