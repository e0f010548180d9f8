"""The embedded CA: what it issues, and which CAs it refuses to be."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store
from OpenSSL import crypto

from meshbpf.agent.core import ca
from meshbpf.agent.core.ca import CaError, CertificateAuthority
from meshbpf.agent.core.errors import Exit
from meshbpf.agent.core.identity import IdentityError, SpiffeId

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
DAY = timedelta(days=1)
ALICE = SpiffeId.parse("spiffe://example.org/ns/web/sa/alice")


def issue(authority: CertificateAuthority, days: float = 1) -> list[x509.Certificate]:
    pem = authority.issue(ALICE, ca.new_key().public_key(), NOW, NOW + DAY * days)
    return x509.load_pem_x509_certificates(pem)


Made = tuple[x509.Certificate, Any]
"""A certificate and its key."""


def make(
    name: str,
    signer: tuple[x509.Certificate, Any] | None = None,
    *,
    key: Any = None,
    basic: bool | None = True,
    sign_usage: bool | None = True,
    days: int = 100,
) -> Made:
    """A certificate (self-signed without `signer`) and its key."""
    key = key or ca.new_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signer[0].subject if signer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY * days)
    )
    if basic is not None:
        builder = builder.add_extension(x509.BasicConstraints(basic, None), critical=True)
    if sign_usage is not None:
        builder = builder.add_extension(
            ca_usage(sign_usage),
            critical=True,
        )
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(signer[1] if signer else key, algorithm), key


def ca_usage(sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign,
        crl_sign=sign,
        encipher_only=False,
        decipher_only=False,
    )


def pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(c.public_bytes(serialization.Encoding.PEM) for c in certificates)


def key_pem(key: Any, password: bytes | None = None) -> bytes:
    encryption = (
        serialization.BestAvailableEncryption(password)
        if password
        else serialization.NoEncryption()
    )
    text: bytes = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )
    return text


ROOT = make("root")
OTHER_ROOT = make("other root")
MIDDLE = make("middle", ROOT)
ISSUING = make("issuing", MIDDLE)
SAME_NAME = make("root")
THREE = pem(ISSUING[0], MIDDLE[0])


def test_leaf_has_the_form_that_istio_issues() -> None:
    authority = ca.create("example.org", NOW)
    (leaf,) = issue(authority)  # the root does not travel
    assert leaf.subject == x509.Name([])
    assert leaf.issuer == authority.issuer.subject
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.critical
    assert list(names.value) == [x509.UniformResourceIdentifier(str(ALICE))]
    usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usage) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    key = leaf.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"
    assert isinstance(leaf.signature_hash_algorithm, hashes.SHA256)


def test_serials_are_random() -> None:
    authority = ca.create("example.org", NOW)
    serials = {issue(authority)[0].serial_number for _ in range(8)}
    assert len(serials) == 8
    assert all(serial.bit_length() > 64 for serial in serials)


@pytest.mark.parametrize("imported", [False, True])
def test_two_verifiers_accept_the_chain_for_both_ends(imported: bool) -> None:
    authority = (
        ca.import_ca(pem(ISSUING[0]), key_pem(ISSUING[1]), pem(MIDDLE[0], ROOT[0]))
        if imported
        else ca.create("example.org", NOW)
    )
    leaf, *intermediates = issue(authority)
    # OpenSSL
    store = crypto.X509Store()
    for root in authority.roots:
        store.add_cert(crypto.X509.from_cryptography(root))
    store.set_time(NOW.replace(tzinfo=None) + DAY / 2)
    context = crypto.X509StoreContext(
        store,
        crypto.X509.from_cryptography(leaf),
        [crypto.X509.from_cryptography(each) for each in intermediates],
    )
    context.verify_certificate()
    if imported:
        return  # the other verifier asks for key identifiers that a foreign CA may lack
    verifier = (
        PolicyBuilder()
        .store(Store(list(authority.roots)))
        .time(NOW + DAY / 2)
        .build_client_verifier()
    )
    assert verifier.verify(leaf, intermediates).subjects == [
        x509.UniformResourceIdentifier(str(ALICE))
    ]


def test_created_ca_names_its_trust_domain_and_lives_ten_years() -> None:
    authority = ca.create("example.org", NOW)
    assert authority.trust_domain == "example.org"
    root = authority.issuer
    assert root.not_valid_before_utc <= NOW
    assert root.not_valid_after_utc - NOW == timedelta(days=3650)
    basic = root.extensions.get_extension_for_class(x509.BasicConstraints)
    assert basic.critical
    assert basic.value.ca


@pytest.mark.parametrize("trust_domain", ["", "a/b", "a b"])
def test_trust_domain_that_no_identity_can_have_makes_no_ca(trust_domain: str) -> None:
    with pytest.raises(IdentityError):
        ca.create(trust_domain, NOW)


def test_ca_survives_its_files() -> None:
    made = ca.create("example.org", NOW)
    loaded = ca.load(made.roots_pem, made.chain_pem, made.key_pem)
    assert (loaded.roots, loaded.chain) == (made.roots, made.chain)
    issue(loaded)[0].verify_directly_issued_by(made.issuer)


def test_leaf_never_outlives_its_issuer() -> None:
    root = make("short", days=3)
    authority = ca.load(pem(root[0]), pem(root[0]), key_pem(root[1]))
    assert issue(authority, days=30)[0].not_valid_after_utc == root[0].not_valid_after_utc


@pytest.mark.parametrize("when", [NOW + 101 * DAY, NOW - 30 * DAY])
def test_expired_or_future_ca_issues_nothing(when: datetime) -> None:
    authority = ca.load(pem(ROOT[0]), pem(ROOT[0]), key_pem(ROOT[1]))
    with pytest.raises(CaError, match=r"valid from .* and not now"):
        authority.issue(ALICE, ca.new_key().public_key(), when, when + DAY)


def test_import_sorts_roots_from_intermediates() -> None:
    authority = ca.import_ca(
        pem(ISSUING[0]), key_pem(ISSUING[1]), pem(MIDDLE[0], ROOT[0], OTHER_ROOT[0])
    )
    assert authority.chain == (ISSUING[0], MIDDLE[0])
    assert set(authority.roots) == {ROOT[0], OTHER_ROOT[0]}
    assert issue(authority)[1:] == [ISSUING[0], MIDDLE[0]]


def test_import_takes_the_chain_from_the_certificates_file_too() -> None:
    authority = ca.import_ca(THREE + pem(ROOT[0]), key_pem(ISSUING[1]))
    assert authority.chain == (ISSUING[0], MIDDLE[0])


@pytest.mark.parametrize(
    ("chain", "roots", "found"),
    [
        ((ISSUING, MIDDLE), (OTHER_ROOT, ROOT), ROOT),
        ((ISSUING, MIDDLE, ROOT), (ROOT,), ROOT),
        ((ISSUING,), (ROOT, MIDDLE), MIDDLE),  # an intermediate as the anchor
        ((ISSUING, MIDDLE), (OTHER_ROOT,), None),
        ((ISSUING,), (ROOT,), None),  # the link between them is missing
        ((MIDDLE,), (SAME_NAME,), None),
        ((MIDDLE,), (SAME_NAME, ROOT), ROOT),
        ((), (ROOT,), None),
        ((ISSUING, MIDDLE), (), None),
    ],
)
def test_the_root_that_a_chain_leads_to(
    chain: tuple[Made, ...], roots: tuple[Made, ...], found: Made | None
) -> None:
    got = ca.anchor_of([one for one, _ in chain], [one for one, _ in roots])
    assert got == (found[0] if found is not None else None)


def test_import_of_a_self_signed_ca_needs_no_chain() -> None:
    authority = ca.import_ca(pem(ROOT[0]), key_pem(ROOT[1]))
    assert authority.chain == authority.roots == (ROOT[0],)
    assert len(issue(authority)) == 1
    assert authority.trust_domain is None


def test_rsa_and_traditional_keys_are_taken() -> None:
    root = make("rsa", key=rsa.generate_private_key(65537, 2048))
    old_form = root[1].private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    issue(ca.import_ca(pem(root[0]), old_form))[0].verify_directly_issued_by(root[0])


ED = make("ed", key=ed25519.Ed25519PrivateKey.generate())
LEAF = make("leaf", ROOT, basic=False)
BARE = make("bare", ROOT, basic=None)
UNUSABLE = make("unusable", ROOT, sign_usage=False)


REFUSED = [
    # roots, chain, key, complaint
    (pem(ROOT[0]), pem(ROOT[0]), key_pem(OTHER_ROOT[1]), "key does not belong to the CA certifi"),
    (pem(ROOT[0]), pem(MIDDLE[0], ISSUING[0]), key_pem(ISSUING[1]), "key does not belong"),
    (pem(ROOT[0]), pem(LEAF[0]), key_pem(LEAF[1]), "'CN=leaf' is not a CA certificate"),
    (pem(ROOT[0]), pem(BARE[0]), key_pem(BARE[1]), "'CN=bare' has no basicConstraints"),
    (pem(ROOT[0]), pem(UNUSABLE[0]), key_pem(UNUSABLE[1]), "may not sign certificates"),
    (pem(OTHER_ROOT[0]), pem(MIDDLE[0]), key_pem(MIDDLE[1]), "'CN=middle' is not signed by any"),
    (pem(SAME_NAME[0]), pem(MIDDLE[0]), key_pem(MIDDLE[1]), "'CN=middle' is not signed by any"),
    (pem(ROOT[0]), pem(ISSUING[0]), key_pem(ISSUING[1]), "'CN=issuing' is not signed by any"),
    (pem(ROOT[0]), pem(ISSUING[0], ROOT[0]), key_pem(ISSUING[1]), "is not signed by certificate"),
    (pem(ROOT[0], LEAF[0]), pem(ROOT[0]), key_pem(ROOT[1]), "'CN=leaf' is not a CA certificate"),
    (b"", pem(ROOT[0]), key_pem(ROOT[1]), "the root certificates: not PEM"),
    (pem(ROOT[0]), b"nonsense", key_pem(ROOT[1]), "the CA certificate: not PEM"),
    (pem(ROOT[0]), pem(ROOT[0]), b"nonsense", "the CA key is not a PEM private key"),
    (pem(ROOT[0]), pem(ROOT[0]), pem(ROOT[0]), "the CA key is not a PEM private key"),
    (pem(ROOT[0]), pem(ROOT[0]), key_pem(ROOT[1], b"secret"), "the CA key is encrypted"),
    (pem(ED[0]), pem(ED[0]), key_pem(ED[1]), "neither an elliptic-curve nor an RSA key"),
    (pem(*[ROOT[0]] * 65), pem(ROOT[0]), key_pem(ROOT[1]), "65 certificates"),
]


@pytest.mark.parametrize(("roots", "chain", "key", "complaint"), REFUSED)
def test_refused(roots: bytes, chain: bytes, key: bytes, complaint: str) -> None:
    with pytest.raises(CaError) as caught:
        ca.load(roots, chain, key)
    assert complaint in caught.value.what
    assert (caught.value.code, caught.value.exit_status) == ("bad-ca", Exit.CONFIG)


def test_import_without_any_root_is_refused() -> None:
    with pytest.raises(CaError, match="no root certificate"):
        ca.import_ca(pem(ISSUING[0]), key_pem(ISSUING[1]), pem(MIDDLE[0]))
