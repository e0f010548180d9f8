"""The embedded certificate authority: issuing and checking, no files.

The form of a certificate is what Istio's CA issues and ztunnel expects:
ECDSA P-256 with SHA-256, an empty subject, the identity as the only (critical)
URI name, good for both ends of mutual TLS. An imported CA may have another
kind of key; the leaves' are P-256 all the same.

Three PEM texts make a CA: its roots (the trust bundle: one or more), the
chain from the issuing certificate towards a root, and the issuing key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meshbpf.agent.core.errors import ConfigError
from meshbpf.agent.core.identity import SCHEME, SpiffeId

CA_LIFETIME = timedelta(days=3650)  # as istiod's self-signed root
_CLOCK_SKEW = timedelta(minutes=2)  # as istiod: a fresh certificate is good on a late clock too
_MAX_CERTIFICATES = 64  # in one file; a bundle is a handful

SigningKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


class CaError(ConfigError):
    """Certificates or a key that cannot serve as a CA."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__("bad-ca", what, hint)


def new_key() -> ec.EllipticCurvePrivateKey:
    """A fresh P-256 key, of the system's randomness."""
    return ec.generate_private_key(ec.SECP256R1())


@dataclass(frozen=True, slots=True)
class CertificateAuthority:
    """A CA that can issue. `chain` starts with the issuing certificate."""

    roots: tuple[x509.Certificate, ...]
    chain: tuple[x509.Certificate, ...]
    key: SigningKey

    @property
    def issuer(self) -> x509.Certificate:
        """The certificate that signs leaves."""
        return self.chain[0]

    @property
    def trust_domain(self) -> str | None:
        """The trust domain that the issuing certificate names for itself, if any."""
        return _trust_domain(self.issuer)

    @property
    def roots_pem(self) -> bytes:
        """The trust bundle."""
        return _pem(self.roots)

    @property
    def chain_pem(self) -> bytes:
        """The issuing certificate and what leads from it towards a root."""
        return _pem(self.chain)

    @property
    def key_pem(self) -> bytes:
        """The issuing key, PKCS #8, not encrypted."""
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    def issue(
        self,
        spiffe: SpiffeId,
        public_key: ec.EllipticCurvePublicKey,
        not_before: datetime,
        not_after: datetime,
    ) -> bytes:
        """A leaf for `spiffe` with the chain to send after it, as PEM; no root in it.

        A leaf never outlives its issuer: `not_after` is cut to the issuer's.
        CaError when the issuer itself is not valid at `not_before`.
        """
        issuer = self.issuer
        not_after = min(not_after, issuer.not_valid_after_utc)
        not_before = max(not_before, issuer.not_valid_before_utc)
        if not_before >= not_after:
            raise CaError(
                f"the CA certificate is valid from {issuer.not_valid_before_utc:%Y-%m-%d %H:%M}"
                f" to {issuer.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, and not now",
                "check the clock, or make or import a new CA",
            )
        leaf = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(issuer.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(not_before)
            .not_valid_after(not_after)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage(
                    [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
                ),
                critical=False,
            )
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(spiffe))]),
                critical=True,
            )
            .add_extension(_authority_key(issuer), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return _pem((leaf, *(c for c in self.chain if not _self_signed(c))))


def create(trust_domain: str, now: datetime) -> CertificateAuthority:
    """A new self-signed CA for `trust_domain`, valid ten years from `now`.

    IdentityError when the trust domain cannot be a part of an identity.
    """
    SpiffeId(trust_domain, "x", "y")  # the same rule as for the leaves
    key = new_key()
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, trust_domain[:64]),
            x509.NameAttribute(NameOID.COMMON_NAME, "meshbpf CA"),
        ]
    )
    subject_key = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    root = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(subject_key, critical=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(SCHEME + trust_domain)]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    return CertificateAuthority((root,), (root,), key)


def load(roots_pem: bytes, chain_pem: bytes, key_pem: bytes) -> CertificateAuthority:
    """Read and check a CA; CaError says which of the three texts is wrong, and how.

    Each certificate of the chain must be a CA's and be signed by the next
    one; the last must be a root or be signed by one; the key must be the
    first one's. Validity in time is checked when issuing.
    """
    roots = _certificates(roots_pem, "the root certificates")
    chain = _certificates(chain_pem, "the CA certificate")
    key = _private_key(key_pem)
    if _public_bytes(key.public_key()) != _public_bytes(chain[0].public_key()):
        raise CaError(
            "the CA key does not belong to the CA certificate",
            "the CA's own certificate must come first, before its intermediates",
        )
    for certificate in (*chain, *roots):
        _check_is_ca(certificate)
    for certificate, signer in pairwise(chain):
        if not _signed_by(certificate, signer):
            raise CaError(
                f"{_name(certificate)} is not signed by {_name(signer)}, which follows it",
                "order the chain from the issuing certificate towards the root",
            )
    last = chain[-1]
    if last not in roots and not any(_signed_by(last, root) for root in roots):
        raise CaError(
            f"{_name(last)} is not signed by any of the root certificates",
            "give the root, and every intermediate between it and the CA",
        )
    return CertificateAuthority(roots, chain, key)


def import_ca(
    certificates_pem: bytes, key_pem: bytes, chain_pem: bytes = b""
) -> CertificateAuthority:
    """A CA from what `ca import` is given: certificate, key, and the rest of the chain.

    The certificate's text may carry its chain itself. Self-signed
    certificates among them are the roots; there must be at least one.
    """
    given = _certificates(certificates_pem, "the CA certificate")
    if chain_pem:
        given += _certificates(chain_pem, "the chain")
    roots = tuple(dict.fromkeys(c for c in given if _self_signed(c)))
    if not roots:
        raise CaError(
            "no root certificate was given",
            "--chain takes the intermediates and the root that peers trust",
        )
    chain = tuple(dict.fromkeys(c for c in given if not _self_signed(c))) or given[:1]
    return load(_pem(roots), _pem(chain), key_pem)


def _certificates(pem: bytes, what: str) -> tuple[x509.Certificate, ...]:
    try:
        found = x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise CaError(f"{what}: not PEM certificates: {error}") from None
    if len(found) > _MAX_CERTIFICATES:
        raise CaError(f"{what}: {len(found)} certificates, at most {_MAX_CERTIFICATES} make sense")
    return tuple(found)


def _private_key(pem: bytes) -> SigningKey:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except TypeError:
        raise CaError("the CA key is encrypted", "decrypt it first: openssl pkey") from None
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CaError(f"the CA key is not a PEM private key: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise CaError("the CA key is neither an elliptic-curve nor an RSA key")
    return key


def anchor_of(
    chain: Sequence[x509.Certificate], roots: Sequence[x509.Certificate]
) -> x509.Certificate | None:
    """The root that `chain`, leaf first, leads to; None where it leads to none of `roots`.

    As in a handshake a root may itself be an intermediate (RFC 5280, section
    6.1.1: any certificate may be a trust anchor). Validity times are not looked at.
    """
    for link in chain:
        for root in roots:
            if link == root or _signed_by(link, root):
                return root
    return None


def _check_is_ca(certificate: x509.Certificate) -> None:
    try:
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        if not basic.ca:
            raise CaError(f"{_name(certificate)} is not a CA certificate")
    except x509.ExtensionNotFound:
        raise CaError(f"{_name(certificate)} has no basicConstraints: not a CA") from None
    except ValueError as error:
        raise CaError(f"{_name(certificate)} has a malformed extension: {error}") from None
    try:
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return  # no KeyUsage: any use
    if not usage.key_cert_sign:
        raise CaError(f"{_name(certificate)} may not sign certificates (keyUsage)")


def _signed_by(certificate: x509.Certificate, signer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(signer)
    except (ValueError, TypeError, InvalidSignature):
        return False  # another name, another kind of key, or another key
    return True


def _self_signed(certificate: x509.Certificate) -> bool:
    return certificate.subject == certificate.issuer and _signed_by(certificate, certificate)


def _authority_key(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    try:
        known = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    except x509.ExtensionNotFound:
        key = issuer.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
            raise CaError(f"{_name(issuer)} has an unusable kind of key") from None
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(key)
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(known.value)


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _trust_domain(certificate: x509.Certificate) -> str | None:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None
    for uri in names.get_values_for_type(x509.UniformResourceIdentifier):
        if uri.startswith(SCHEME):
            return uri.removeprefix(SCHEME).partition("/")[0] or None
    return None


def _public_bytes(key: object) -> bytes:
    if not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
        return b""
    return key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _pem(certificates: Sequence[x509.Certificate]) -> bytes:
    return b"".join(c.public_bytes(serialization.Encoding.PEM) for c in certificates)


def _name(certificate: x509.Certificate) -> str:
    subject = certificate.subject.rfc4514_string()
    return f"certificate {subject!r}" if subject else f"certificate {certificate.serial_number:x}"
