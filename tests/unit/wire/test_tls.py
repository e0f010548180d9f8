"""TLS in memory, both ends real: who is let in, who is not, and how bytes move."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from OpenSSL import SSL

from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.wire import records
from meshbpf.agent.wire.errors import TlsError
from meshbpf.agent.wire.tls import Expectation, WorkloadTls, workload_tls
from meshbpf.agent.wire.tls_channel import TlsChannel

pytestmark = pytest.mark.compat

NOW = datetime.now(UTC)
WEB = SpiffeId("cluster.local", "web", "web")
DB = SpiffeId("cluster.local", "db", "db")


class Authority:
    """Issues whatever a test wants, also what a proper CA would not."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test root")])
        self.root = (
            x509.CertificateBuilder()
            .subject_name(self.name)
            .issuer_name(self.name)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - timedelta(days=2))
            .not_valid_after(NOW + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self.key, hashes.SHA256())
        )
        self.root_pem = self.root.public_bytes(serialization.Encoding.PEM)

    def leaf(
        self,
        *uris: str,
        usages: tuple[x509.ObjectIdentifier, ...] = (
            ExtendedKeyUsageOID.SERVER_AUTH,
            ExtendedKeyUsageOID.CLIENT_AUTH,
        ),
        ends: timedelta = timedelta(hours=1),
    ) -> tuple[bytes, ec.EllipticCurvePrivateKey]:
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - timedelta(days=1))
            .not_valid_after(NOW + ends)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        )
        if uris:
            names = [x509.UniformResourceIdentifier(uri) for uri in uris]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
        leaf = builder.sign(self.key, hashes.SHA256())
        return leaf.public_bytes(serialization.Encoding.PEM), key

    def tls(self, identity: SpiffeId) -> WorkloadTls:
        chain, key = self.leaf(str(identity))
        return workload_tls(chain, key, self.root_pem)

    def raw_client(
        self, certificate: tuple[bytes, ec.EllipticCurvePrivateKey] | None
    ) -> SSL.Context:
        """A client that checks nothing, with any certificate or none."""
        context = SSL.Context(SSL.TLS_METHOD)
        if certificate is not None:
            pem, key = certificate
            context.use_certificate(x509.load_pem_x509_certificate(pem))
            context.use_privatekey(key)
        context.set_alpn_protos([b"h2"])
        return context


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def server_channel(tls: WorkloadTls) -> TlsChannel:
    return TlsChannel(tls.server, Expectation(trust_domain="cluster.local"), server=True)


def client_channel(tls: WorkloadTls, *allowed: SpiffeId) -> TlsChannel:
    return TlsChannel(tls.client, Expectation(allowed=frozenset(allowed)), server=False)


def connect(client: TlsChannel, server: TlsChannel) -> None:
    """Handshake until both are done. Raises the TlsError of whoever refuses."""
    client_done = server_done = False
    for _ in range(10):
        if not client_done:
            client_done = client.handshake()
        server.receive(memoryview(client.take()))
        if not server_done:
            server_done = server.handshake()
        client.receive(memoryview(server.take()))
        if client_done and server_done:
            return
    raise AssertionError("the handshake does not end")


def refused_by_server(tls: WorkloadTls, client: SSL.Context) -> str:
    """Why our server refuses this client; the client must learn of it by an alert."""
    server = server_channel(tls)
    raw = SSL.Connection(client, None)
    raw.set_connect_state()
    refusal = ""
    while not refusal:
        with contextlib.suppress(SSL.WantReadError):
            raw.do_handshake()
        server.receive(memoryview(raw.bio_read(65536)))
        try:
            assert not server.handshake(), "the server accepted"
        except TlsError as error:
            refusal = error.what
        raw.bio_write(server.take())
    with pytest.raises(SSL.Error, match="alert"):
        raw.recv(1)
    return refusal


def test_both_sides_learn_who_the_other_is(authority: Authority) -> None:
    client, server = client_channel(authority.tls(WEB), DB), server_channel(authority.tls(DB))
    connect(client, server)
    assert (client.peer, server.peer) == (DB, WEB)


def test_the_connection_is_tls_1_3_with_aes_gcm_and_h2(authority: Authority) -> None:
    client, server = client_channel(authority.tls(WEB), DB), server_channel(authority.tls(DB))
    connect(client, server)
    connection = client._connection
    assert connection.get_protocol_version_name() == "TLSv1.3"
    assert connection.get_cipher_name() == "TLS_AES_128_GCM_SHA256"
    assert connection.get_alpn_proto_negotiated() == b"h2"


def test_a_client_takes_any_one_of_the_allowed_ids(authority: Authority) -> None:
    client, server = client_channel(authority.tls(WEB), WEB, DB), server_channel(authority.tls(DB))
    connect(client, server)
    assert client.peer == DB


def test_a_client_refuses_a_server_with_another_id(authority: Authority) -> None:
    client, server = client_channel(authority.tls(WEB), WEB), server_channel(authority.tls(DB))
    with pytest.raises(TlsError, match=r"the peer is spiffe:.*/ns/db/sa/db, expected"):
        connect(client, server)


def test_a_client_that_allows_nobody_refuses_everybody(authority: Authority) -> None:
    client, server = client_channel(authority.tls(WEB)), server_channel(authority.tls(DB))
    with pytest.raises(TlsError, match="expected"):
        connect(client, server)


def test_a_client_refuses_a_server_of_another_root(authority: Authority) -> None:
    client, server = client_channel(authority.tls(WEB), DB), server_channel(Authority().tls(DB))
    with pytest.raises(TlsError, match="does not verify"):
        connect(client, server)


def test_a_server_refuses_a_client_without_certificate(authority: Authority) -> None:
    why = refused_by_server(authority.tls(DB), authority.raw_client(None))
    assert "peer did not return a certificate" in why


def test_a_server_refuses_a_client_of_another_root(authority: Authority) -> None:
    stranger = Authority()
    why = refused_by_server(authority.tls(DB), authority.raw_client(stranger.leaf(str(WEB))))
    assert "does not verify" in why


def test_a_server_refuses_a_client_of_another_trust_domain(authority: Authority) -> None:
    foreign = authority.leaf("spiffe://elsewhere/ns/web/sa/web")
    why = refused_by_server(authority.tls(DB), authority.raw_client(foreign))
    assert "outside the trust domain cluster.local" in why


@pytest.mark.parametrize(
    "uris",
    [
        (),
        ("https://cluster.local/ns/web/sa/web",),
        ("spiffe://cluster.local/web",),
        ("spiffe://cluster.local/ns/web/sa/web/extra",),
        ("spiffe://cluster.local/ns//sa/web",),
    ],
)
def test_a_server_refuses_a_certificate_without_spiffe_id(
    authority: Authority, uris: tuple[str, ...]
) -> None:
    why = refused_by_server(authority.tls(DB), authority.raw_client(authority.leaf(*uris)))
    assert "carries no SPIFFE id" in why


def test_one_fitting_id_among_several_is_enough_and_the_first_is_the_peer(
    authority: Authority,
) -> None:
    chain, key = authority.leaf("https://x/", "spiffe://elsewhere/ns/a/sa/b", str(WEB))
    server = server_channel(authority.tls(DB))
    connect(client_channel(workload_tls(chain, key, authority.root_pem), DB), server)
    assert server.peer == SpiffeId("elsewhere", "a", "b")


def test_a_server_refuses_a_certificate_that_is_not_for_clients(authority: Authority) -> None:
    leaf = authority.leaf(str(WEB), usages=(ExtendedKeyUsageOID.SERVER_AUTH,))
    why = refused_by_server(authority.tls(DB), authority.raw_client(leaf))
    assert "does not verify" in why


def test_a_server_refuses_an_expired_certificate(authority: Authority) -> None:
    leaf = authority.leaf(str(WEB), ends=-timedelta(minutes=1))
    why = refused_by_server(authority.tls(DB), authority.raw_client(leaf))
    assert "cert has expired" in why


def _tls_1_2(context: SSL.Context) -> None:
    context.set_max_proto_version(SSL.TLS1_2_VERSION)


def _chacha(context: SSL.Context) -> None:
    context.set_tls13_ciphersuites(b"TLS_CHACHA20_POLY1305_SHA256")


def _http_1(context: SSL.Context) -> None:
    context.set_alpn_protos([b"http/1.1"])


@pytest.mark.parametrize("spoil", [_tls_1_2, _chacha, _http_1])
def test_a_server_refuses_other_versions_ciphers_and_protocols(
    authority: Authority, spoil: Callable[[SSL.Context], None]
) -> None:
    client = authority.raw_client(authority.leaf(str(WEB)))
    spoil(client)
    assert refused_by_server(authority.tls(DB), client)


def test_a_session_is_never_resumed(authority: Authority) -> None:
    tls = authority.tls(DB)
    context = authority.raw_client(authority.leaf(str(WEB)))
    session = None
    for _ in range(2):
        server = server_channel(tls)
        raw = SSL.Connection(context, None)
        if session is not None:
            raw.set_session(session)
        raw.set_connect_state()
        done = False
        while not done:
            with contextlib.suppress(SSL.WantReadError):
                raw.do_handshake()
                done = True
            server.receive(memoryview(raw.bio_read(65536)))
            server.handshake()
            raw.bio_write(server.take())
        with pytest.raises(SSL.WantReadError):
            raw.recv(1)  # takes in a ticket, if there is one
        session = raw.get_session()
        # Each time the certificate was looked at anew.
        assert server.peer == WEB


@pytest.mark.parametrize("kind", [records.PublicRecords, records.DirectRecords])
def test_a_megabyte_passes_in_both_kinds_of_records(authority: Authority, kind: type) -> None:
    client, server = client_channel(authority.tls(WEB), DB), server_channel(authority.tls(DB))
    connect(client, server)
    for channel in (client, server):
        channel._records = kind(channel._connection)
    sent = bytes(range(256)) * 4096
    received = bytearray()
    wire, plain = memoryview(bytearray(70_000)), memoryview(bytearray(50_000))
    for start in range(0, len(sent), 200_000):
        client.write(memoryview(sent)[start : start + 200_000])
        while size := client.take_into(wire):
            server.receive(wire[:size])
            while size := server.read_into(plain):
                received += plain[:size]
    assert received == sent


@pytest.mark.parametrize("kind", [records.PublicRecords, records.DirectRecords])
def test_what_came_before_the_end_of_tls_is_read_before_the_end(
    authority: Authority, kind: type
) -> None:
    client, server = client_channel(authority.tls(WEB), DB), server_channel(authority.tls(DB))
    connect(client, server)
    server._records = kind(server._connection)
    client.write(b"last words")
    client.close()
    server.receive(memoryview(client.take()))
    plain = memoryview(bytearray(100))
    assert bytes(plain[: server.read_into(plain)]) == b"last words"
    with pytest.raises(TlsError, match="closed"):
        server.read_into(plain)


@pytest.mark.parametrize("kind", [records.PublicRecords, records.DirectRecords])
def test_a_forged_record_is_an_error(authority: Authority, kind: type) -> None:
    client, server = client_channel(authority.tls(WEB), DB), server_channel(authority.tls(DB))
    connect(client, server)
    server._records = kind(server._connection)
    client.write(b"x" * 100)
    forged = bytearray(client.take())
    forged[-1] ^= 1
    server.receive(memoryview(forged))
    with pytest.raises(TlsError, match="record failed"):
        server.read_into(memoryview(bytearray(100)))


def test_this_pyopenssl_offers_the_direct_way(authority: Authority) -> None:
    channel = client_channel(authority.tls(WEB), DB)
    assert isinstance(channel._records, records.DirectRecords)


def test_own_certificate_without_identity_is_refused(authority: Authority) -> None:
    chain, key = authority.leaf()
    with pytest.raises(TlsError, match="no SPIFFE id"):
        workload_tls(chain, key, authority.root_pem)
