"""Certificates for peers, right and wrong ones, made with `cryptography` alone.

On purpose not with meshbpf's own CA code: what it accepts here, it has not made.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_LIFE = datetime.timedelta(hours=1)
_SKEW = datetime.timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class Credentials:
    """Files of a certificate with its chain, and of its key."""

    cert: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Issuer:
    """A CA that signs whatever it is asked to."""

    cert: x509.Certificate
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

    @classmethod
    def load(cls, cert: Path, key: Path) -> Issuer:
        loaded = serialization.load_pem_private_key(key.read_bytes(), None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey)
        return cls(x509.load_pem_x509_certificate(cert.read_bytes()), loaded)

    @classmethod
    def foreign(cls, like: Issuer) -> Issuer:
        """Another CA under the same name: only its signature tells it from `like`."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = like.cert.subject
        builder = _builder(name, name, key.public_key()).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        return cls(builder.sign(key, hashes.SHA256()), key)

    def issue(self, directory: Path, name: str, san: x509.GeneralName) -> Credentials:
        """A client certificate for exactly this name, its files below `directory`."""
        key = ec.generate_private_key(ec.SECP256R1())
        nobody = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "peer")])
        builder = (
            _builder(nobody, self.cert.subject, key.public_key())
            .add_extension(x509.SubjectAlternativeName([san]), critical=False)
            .add_extension(
                x509.ExtendedKeyUsage(
                    [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
                ),
                critical=False,
            )
        )
        leaf = builder.sign(self.key, hashes.SHA256())
        made = Credentials(directory / f"{name}.pem", directory / f"{name}.key")
        pem = serialization.Encoding.PEM
        made.cert.write_bytes(leaf.public_bytes(pem) + self.cert.public_bytes(pem))
        made.key.write_bytes(
            key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        return made


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + _LIFE)
    )
