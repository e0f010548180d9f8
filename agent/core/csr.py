"""Certificate signing requests, and what must hold of the answer."""

from __future__ import annotations

from datetime import datetime

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.identity import SpiffeId


class AnswerError(MeshbpfError):
    """A signer's answer that is no certificate for what was asked."""

    def __init__(self, identity: SpiffeId, what: str) -> None:
        super().__init__("bad-certificate-answer", f"the certificate for {identity}: {what}")


def signing_request(identity: SpiffeId, key: ec.EllipticCurvePrivateKey) -> bytes:
    """PEM: no subject, one critical URI, as SPIFFE's X.509-SVIDs are asked for."""
    san = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(identity))])
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    request = builder.add_extension(san, critical=True).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def check_answer(
    identity: SpiffeId, key: ec.EllipticCurvePrivateKey, chain_pem: bytes, now: datetime
) -> None:
    """Raise AnswerError unless the leaf is of our key and holds now; whose it is `tls` checks."""
    try:
        leaf, *_ = x509.load_pem_x509_certificates(chain_pem)
        public_key = leaf.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise AnswerError(identity, f"not a PEM chain: {error}") from error
    if public_key != key.public_key():
        raise AnswerError(identity, "it is for another key")
    if leaf.not_valid_after_utc <= now:
        raise AnswerError(identity, f"it ended at {leaf.not_valid_after_utc.isoformat()}")


def check_roots(identity: SpiffeId, roots_pem: bytes) -> None:
    """Raise AnswerError unless there is a root, and each can be read."""
    try:
        found = x509.load_pem_x509_certificates(roots_pem)
    except ValueError as error:
        raise AnswerError(identity, f"its roots cannot be read: {error}") from error
    if not found:
        raise AnswerError(identity, "it came without roots")
