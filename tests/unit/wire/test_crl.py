"""Revocation lists: which can be read, whom they revoke, and what a handshake then does."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from OpenSSL import SSL, crypto

from meshbpf.agent.core import ca
from meshbpf.agent.core.errors import ConfigError
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.traffic import Reporter
from meshbpf.agent.wire.crl import Revocations, read_lists
from meshbpf.agent.wire.errors import RevokedError, TlsError
from meshbpf.agent.wire.tls import Expectation, WorkloadTls, workload_tls
from meshbpf.agent.wire.tls_channel import TlsChannel
from tests.revoking import crl_pem
from tests.unit.wire.test_tls import connect

pytestmark = pytest.mark.compat

NOW = datetime.now(UTC)
WEB = SpiffeId("cluster.local", "web", "web")
DB = SpiffeId("cluster.local", "db", "db")
PEM, DER = serialization.Encoding.PEM, serialization.Encoding.DER


class Signer:
    """A CA; one with a `parent` is an intermediate."""

    def __init__(self, name: str, parent: Signer | None = None) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.parent = parent
        above = parent or self
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(self.name)
            .issuer_name(above.name)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - timedelta(days=2))
            .not_valid_after(NOW + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(False, False, False, False, False, True, True, False, False),
                critical=True,
            )
            .sign(above.key, hashes.SHA256())
        )

    def leaf(self, identity: SpiffeId) -> tuple[list[x509.Certificate], ec.EllipticCurvePrivateKey]:
        """A certificate with the intermediates above it, and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - timedelta(days=1))
            .not_valid_after(NOW + timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(identity))]),
                critical=True,
            )
            .sign(self.key, hashes.SHA256())
        )
        chain, signer = [leaf], self
        while signer.parent is not None:
            chain.append(signer.certificate)
            signer = signer.parent
        return chain, key

    def crl(
        self,
        *serials: int,
        age: timedelta = timedelta(0),
        extensions: Sequence[tuple[x509.ExtensionType, bool]] = (),
    ) -> x509.CertificateRevocationList:
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.name)
            .last_update(NOW - age)
            .next_update(NOW - age + timedelta(days=1))
        )
        for serial in serials:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(NOW).build()
            )
        for value, critical in extensions:
            builder = builder.add_extension(value, critical=critical)
        return builder.sign(self.key, hashes.SHA256())


class Peers:
    """A client below an intermediate, a server below the root, and lists that both look at."""

    def __init__(self) -> None:
        self.root = Signer("root")
        self.middle = Signer("middle", self.root)
        self.revocations = Revocations()
        self.web, self.web_tls = self._make(self.middle, WEB)
        self.db, self.db_tls = self._make(self.root, DB)

    def _make(
        self, signer: Signer, identity: SpiffeId
    ) -> tuple[list[x509.Certificate], WorkloadTls]:
        chain, key = signer.leaf(identity)
        pem = b"".join(each.public_bytes(PEM) for each in chain)
        roots = self.root.certificate.public_bytes(PEM)
        return chain, workload_tls(pem, key, roots, self.revocations)

    def use(self, *lists: x509.CertificateRevocationList) -> int:
        pem = b"".join(each.public_bytes(PEM) for each in lists)
        return self.revocations.replace(read_lists(pem, "test"))

    def connect(self) -> tuple[TlsChannel, TlsChannel]:
        """A handshake; the TlsError of whoever refuses."""
        client = TlsChannel(self.web_tls.client, Expectation(frozenset({DB})), server=False)
        server = TlsChannel(
            self.db_tls.server, Expectation(trust_domain="cluster.local"), server=True
        )
        connect(client, server)
        return client, server


@pytest.fixture
def peers() -> Peers:
    return Peers()


def test_pem_may_hold_several_lists_and_der_one() -> None:
    root = Signer("root")
    first, second = root.crl(1, 2), root.crl(3)
    both = (
        b"a comment\n"
        + first.public_bytes(PEM)
        + root.certificate.public_bytes(PEM)
        + second.public_bytes(PEM)
    )
    assert [each.serials for each in read_lists(both, "f")] == [{1, 2}, {3}]
    assert [each.serials for each in read_lists(first.public_bytes(DER), "f")] == [{1, 2}]


@pytest.mark.parametrize("content", [b"", b"\n"])
def test_an_empty_file_revokes_nothing(content: bytes) -> None:
    assert read_lists(content, "f") == ()


def test_pem_without_a_list_revokes_nothing() -> None:
    assert read_lists(Signer("root").certificate.public_bytes(PEM), "f") == ()


def test_what_is_no_list_is_refused_with_the_files_name() -> None:
    whole = Signer("root").crl(1).public_bytes(PEM)
    garbled = whole.replace(b"A", b"B")
    for content in (b"not a list", whole[: len(whole) // 2], whole + whole[:40], garbled):
        with pytest.raises(ConfigError, match=r"^/crl/a\.pem is no certificate") as caught:
            read_lists(content, "/crl/a.pem")
        assert caught.value.code == "bad-crl"


def test_a_list_with_any_byte_garbled_is_read_or_refused_and_breaks_nothing() -> None:
    signer = Signer("root")
    number = x509.CRLNumber(7)
    key = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key())
    whole = signer.crl(1, 2, extensions=[(number, False), (key, False)]).public_bytes(DER)
    refused = 0
    for at in range(len(whole)):
        for flip in (0x01, 0x20, 0x80):
            content = bytearray(whole)
            content[at] ^= flip
            try:
                (found,) = read_lists(bytes(content), "f")
                # The signature covers all but how many bits of its own are used.
                assert found.serials == {1, 2} or not found.signed_by(signer.certificate)
            except ConfigError:
                refused += 1
    assert 100 < refused < 3 * len(whole)


@pytest.mark.parametrize(
    ("value", "critical"),
    [
        (x509.DeltaCRLIndicator(1), True),
        (
            x509.IssuingDistributionPoint(
                [x509.UniformResourceIdentifier("http://crl.example")],
                None,
                only_contains_user_certs=False,
                only_contains_ca_certs=False,
                only_some_reasons=None,
                indirect_crl=True,
                only_contains_attribute_certs=False,
            ),
            True,
        ),
        (x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00"), True),
    ],
    ids=["delta", "indirect", "unknown"],
)
def test_a_list_whose_numbers_may_mean_something_else_is_refused(
    value: x509.ExtensionType, critical: bool
) -> None:
    crl = Signer("root").crl(1, extensions=[(value, critical)])
    with pytest.raises(ConfigError):
        read_lists(crl.public_bytes(PEM), "f")


def test_without_lists_nobody_is_refused(peers: Peers) -> None:
    peers.connect()
    assert not peers.revocations.rejected


def test_a_server_refuses_a_revoked_client(peers: Peers) -> None:
    peers.use(peers.middle.crl(peers.web[0].serial_number))
    with pytest.raises(RevokedError, match=r"chain of spiffe://.*/sa/web was revoked"):
        peers.connect()
    assert peers.revocations.rejected == {Reporter.DESTINATION: 1}


def test_a_client_refuses_a_revoked_server(peers: Peers) -> None:
    peers.use(peers.root.crl(peers.db[0].serial_number))
    with pytest.raises(RevokedError, match=r"chain of spiffe://.*/sa/db was revoked") as caught:
        peers.connect()
    assert caught.value.code == "cert-revoked"
    assert peers.revocations.rejected == {Reporter.SOURCE: 1}


def test_a_revoked_intermediate_takes_its_leaves_along(peers: Peers) -> None:
    peers.use(peers.root.crl(peers.middle.certificate.serial_number))
    with pytest.raises(RevokedError):
        peers.connect()


def test_each_list_of_an_issuer_counts(peers: Peers) -> None:
    serial = peers.web[0].serial_number
    peers.use(peers.middle.crl(), peers.middle.crl(serial), peers.middle.crl(1))
    with pytest.raises(RevokedError):
        peers.connect()


def test_a_certificate_of_which_no_list_speaks_is_good(peers: Peers) -> None:
    other = Signer("other")
    serials = [peers.web[0].serial_number, peers.db[0].serial_number]
    # The root's list has the client's number, and not the client: the intermediate signed that.
    peers.use(other.crl(*serials), peers.root.crl(serials[0]), peers.middle.crl(serials[1]))
    peers.connect()


def test_a_list_counts_after_its_end(peers: Peers) -> None:
    peers.use(peers.middle.crl(peers.web[0].serial_number, age=timedelta(days=30)))
    with pytest.raises(RevokedError):
        peers.connect()


def test_a_list_that_the_issuers_key_did_not_sign_revokes_nothing(peers: Peers) -> None:
    impostor = Signer("middle")
    peers.use(impostor.crl(peers.web[0].serial_number))
    peers.connect()


def test_a_list_that_is_replaced_counts_no_more(peers: Peers) -> None:
    peers.use(peers.middle.crl(peers.web[0].serial_number))
    peers.use(peers.middle.crl())
    peers.connect()


def test_a_new_list_ends_the_tunnels_of_those_whom_it_revokes_and_no_others(peers: Peers) -> None:
    client, server = peers.connect()
    ended: list[tuple[str, RevokedError]] = []
    with (
        client.watched(lambda error: ended.append(("client", error))),
        server.watched(lambda error: ended.append(("server", error))),
    ):
        assert peers.use(peers.middle.crl(1)) == 0
        assert not ended
        assert peers.use(peers.middle.crl(peers.web[0].serial_number)) == 1
        assert [side for side, _ in ended] == ["server"], "who has the revoked one for a peer"
        assert ended[0][1].what == f"the certificate of {WEB} was revoked"
        assert peers.use(peers.middle.crl(peers.web[0].serial_number)) == 0, "ended once"
    assert peers.revocations.rejected == {Reporter.DESTINATION: 1}


def test_a_tunnel_that_has_ended_is_not_watched(peers: Peers) -> None:
    _, server = peers.connect()
    with ExitStack() as stack:
        stack.enter_context(server.watched(lambda _: pytest.fail("it had ended")))
    assert peers.use(peers.middle.crl(peers.web[0].serial_number)) == 0


def test_lists_that_came_between_handshake_and_watch_end_the_tunnel(peers: Peers) -> None:
    _, server = peers.connect()
    peers.use(peers.middle.crl(peers.web[0].serial_number))
    ended: list[RevokedError] = []
    with server.watched(ended.append):
        assert len(ended) == 1


def test_a_peer_is_untracked_when_a_certificate_above_it_cannot_be_read(peers: Peers) -> None:
    chain, key = peers.middle.leaf(WEB)
    context = SSL.Context(SSL.TLS_METHOD)
    context.use_certificate(chain[0])
    context.use_privatekey(key)
    with pytest.warns(
        DeprecationWarning, match="X509 objects"
    ):  # cryptography has no object for this one
        context.add_extra_chain_cert(_lax(peers.middle.certificate, peers.root.key))
    context.set_alpn_protos([b"h2"])
    peers.use(peers.middle.crl(chain[0].serial_number))
    client = TlsChannel(context, Expectation(), server=False)
    server = TlsChannel(peers.db_tls.server, Expectation(trust_domain="cluster.local"), server=True)
    connect(client, server)
    assert peers.revocations.untracked == {Reporter.DESTINATION: 1}
    assert not peers.revocations.rejected


def test_a_chain_that_does_not_verify_is_no_matter_of_revocation(peers: Peers) -> None:
    stranger = Peers()
    peers.use(peers.root.crl(1))
    client = TlsChannel(stranger.web_tls.client, Expectation(frozenset({DB})), server=False)
    server = TlsChannel(peers.db_tls.server, Expectation(trust_domain="cluster.local"), server=True)
    with pytest.raises(TlsError) as caught:
        connect(client, server)
    assert caught.value.code == "tls-handshake"
    assert not peers.revocations.rejected


def test_lists_of_our_own_ca_are_believed() -> None:
    authority = ca.create("cluster.local", NOW - timedelta(hours=1))
    (found,) = read_lists(crl_pem(authority.issuer, authority.key, 7), "f")
    assert found.serials == {7}
    assert found.signed_by(authority.issuer)


def _lax(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> crypto.X509:
    """The same with `critical FALSE` written out, which OpenSSL reads and cryptography does not."""
    usage = b"\x06\x03\x55\x1d\x0f\x01\x01"
    body = certificate.tbs_certificate_bytes
    assert usage + b"\xff" in body
    body = body.replace(usage + b"\xff", usage + b"\x00")
    algorithm = bytes.fromhex("300a06082a8648ce3d040302")  # ecdsa-with-SHA256
    signature = key.sign(body, ec.ECDSA(hashes.SHA256()))
    whole = body + algorithm + _der(0x03, b"\x00" + signature)
    with pytest.raises(ValueError, match="EncodedDefault"):
        x509.load_der_x509_certificate(_der(0x30, whole))
    return crypto.load_certificate(crypto.FILETYPE_ASN1, _der(0x30, whole))


def _der(tag: int, value: bytes) -> bytes:
    size = len(value)
    if size < 0x80:
        return bytes((tag, size)) + value
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(length))) + length + value
