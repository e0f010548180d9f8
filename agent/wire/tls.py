"""TLS contexts for HBONE: version, ciphers, ALPN and the SPIFFE checks on both sides.

What OpenSSL checks by itself: the chain up to one of our roots, validity
times, and that an extendedKeyUsage, if there is one, allows the part that the
peer plays (clientAuth or serverAuth). What this file adds:

- A server wants a client certificate with some SPIFFE id in the trust domain
  of the server's own certificate.
- A client wants any SPIFFE id of the server's to equal one that it allows.
  The allowed set differs from dial to dial while the context is shared, so
  it travels as the connection's `Expectation`.
- Both look the peer's chain up in revocation lists, where there are any
  (crl.py).

All run inside OpenSSL's verify callback: a refusal reaches the peer as a
TLS alert, and no application byte was exchanged. Sessions are never resumed:
a resumed one skips the chain check.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

from cryptography import x509
from OpenSSL import SSL, crypto

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.traffic import Reporter
from meshbpf.agent.wire.crl import Issuer, Revocations, Standing, links_of
from meshbpf.agent.wire.errors import TlsError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

ALPN_H2 = b"h2"
# Those of ztunnel, in our order: keys and key exchange are of 128-bit strength (P-256,
# X25519), so that a longer cipher key adds nothing but a third to its time.
CIPHERSUITES = b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384"
_MODE_ENABLE_PARTIAL_WRITE = 0x1  # openssl/ssl.h; pyOpenSSL sets it without a name for it

_REASONS = {
    number: name.removeprefix("ERR_").lower().replace("_", " ")
    for name, number in vars(SSL.X509VerificationCodes).items()
    if name.startswith("ERR_")
}


@dataclass(slots=True, eq=False)
class Expectation:
    """What one connection wants of its peer, and what the peer then proved.

    `allowed` None stands for "any id in `trust_domain`".
    """

    allowed: frozenset[SpiffeId] | None = None
    trust_domain: str = ""
    peer: SpiffeId | None = field(default=None, init=False)
    """The first SPIFFE id of the peer's certificate, once it was accepted."""
    refusal: str = field(default="", init=False)
    """Why the peer's certificate was not accepted."""
    revoked: bool = field(default=False, init=False)
    """It was refused because a revocation list has it."""
    standing: Standing | None = field(default=None, init=False)
    """What may be revoked later; None without revocation lists."""
    chain: list[Issuer] = field(default_factory=list, init=False)
    """The CAs verified so far, from the anchor down; kept where there are revocation lists."""

    def judge(self, certificate: x509.Certificate) -> bool:
        """Whether the peer's certificate, whose chain holds already, is one we talk to."""
        ids = spiffe_ids(certificate)
        if not ids:
            self.refusal = "the peer's certificate carries no SPIFFE id"
            return False
        shown = ", ".join(map(str, ids))
        if self.allowed is None:
            if all(each.trust_domain != self.trust_domain for each in ids):
                self.refusal = f"{shown} is outside the trust domain {self.trust_domain}"
                return False
        elif self.allowed.isdisjoint(ids):
            wanted = ", ".join(sorted(map(str, self.allowed)))
            self.refusal = f"the peer is {shown}, expected {wanted}"
            return False
        self.peer = ids[0]
        return True


@dataclass(frozen=True, slots=True)
class WorkloadTls:
    """The TLS contexts of one workload identity, from one certificate."""

    identity: SpiffeId
    server: SSL.Context
    client: SSL.Context
    not_before: datetime
    not_after: datetime


def workload_tls(
    chain_pem: bytes,
    key: EllipticCurvePrivateKey,
    roots_pem: bytes,
    revocations: Revocations | None = None,
) -> WorkloadTls:
    """Both contexts for the certificate at the head of `chain_pem`."""
    leaf, _ = _chain(chain_pem)
    return WorkloadTls(
        identity=_own_identity(leaf),
        server=server_context(chain_pem, key, roots_pem, revocations),
        client=client_context(chain_pem, key, roots_pem, revocations),
        not_before=leaf.not_valid_before_utc,
        not_after=leaf.not_valid_after_utc,
    )


def server_context(
    chain_pem: bytes,
    key: EllipticCurvePrivateKey,
    roots_pem: bytes,
    revocations: Revocations | None = None,
) -> SSL.Context:
    """A context that serves HBONE; clients must prove an id of the same trust domain."""
    context = _context(chain_pem, key, roots_pem)
    verifier = _Verifier(Reporter.DESTINATION, revocations)
    context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, verifier)
    context.set_alpn_select_callback(_select_alpn)
    return context


def client_context(
    chain_pem: bytes,
    key: EllipticCurvePrivateKey,
    roots_pem: bytes,
    revocations: Revocations | None = None,
) -> SSL.Context:
    """A context that dials HBONE; whom to expect is said for each connection."""
    context = _context(chain_pem, key, roots_pem)
    verifier = _Verifier(Reporter.SOURCE, revocations)
    context.set_verify(SSL.VERIFY_PEER, verifier)
    context.set_alpn_protos([ALPN_H2])
    return context


def spiffe_ids(certificate: x509.Certificate) -> list[SpiffeId]:
    """The SPIFFE ids among a certificate's URI SANs, in order; other URIs are passed over."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    ids = []
    for uri in names.get_values_for_type(x509.UniformResourceIdentifier):
        try:
            ids.append(SpiffeId.parse(uri))
        except MeshbpfError:
            continue  # some other URI; only an exact SPIFFE form is an identity
    return ids


def _context(chain_pem: bytes, key: EllipticCurvePrivateKey, roots_pem: bytes) -> SSL.Context:
    leaf, intermediates = _chain(chain_pem)
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_max_proto_version(SSL.TLS1_3_VERSION)
    context.set_tls13_ciphersuites(CIPHERSUITES)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_options(SSL.OP_NO_TICKET | SSL.OP_NO_COMPRESSION | SSL.OP_NO_RENEGOTIATION)
    # Without an id a client that offers an old session would be refused
    # instead of being given a full handshake.
    context.set_session_id(b"meshbpf")
    # One SSL_write is to turn a whole chunk into records; with this mode on,
    # which is pyOpenSSL's default, it returns after the first 16 KiB.
    context.clear_mode(_MODE_ENABLE_PARTIAL_WRITE)
    context.use_certificate(leaf)
    for certificate in intermediates:
        context.add_extra_chain_cert(certificate)
    context.use_privatekey(key)
    context.check_privatekey()
    store = context.get_cert_store()
    if store is None:
        raise TlsError("no-cert-store", "OpenSSL gave a context without a certificate store")
    # A root file may name an intermediate as its anchor.
    store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)
    for root in _certificates(roots_pem, "the trusted roots"):
        store.add_cert(crypto.X509.from_cryptography(root))
    return context


@dataclass(frozen=True, slots=True)
class _Verifier:
    """OpenSSL's verify callback: called for each certificate from the anchor down to the leaf."""

    reporter: Reporter
    """Which end of the connection we are."""
    revocations: Revocations | None

    def __call__(
        self,
        connection: SSL.Connection,
        certificate: crypto.X509,
        error: int,
        depth: int,
        ok: int,
    ) -> bool:
        """True would clear an error, so `ok` decides first."""
        expectation = connection.get_app_data()
        if not isinstance(expectation, Expectation):
            return False
        if not ok:
            reason = _REASONS.get(error, f"X.509 error {error}")
            expectation.refusal = f"the peer's certificate does not verify: {reason}, depth {depth}"
            return False
        if depth > 0:
            if self.revocations is not None:
                self._note(expectation, certificate, self.revocations)
            return True
        leaf = certificate.to_cryptography()
        if self.revocations is not None and not self._stands(expectation, leaf, self.revocations):
            return False
        return expectation.judge(leaf)

    def _note(
        self, expectation: Expectation, certificate: crypto.X509, revocations: Revocations
    ) -> None:
        try:
            expectation.chain.append(Issuer.of(certificate.to_cryptography()))
        except (ValueError, x509.InvalidVersion):
            # OpenSSL can read it, and found it good. What is below it has an issuer
            # whose key we do not have: its status is unknown, which is let pass.
            expectation.chain.clear()
            revocations.untracked[self.reporter] += 1

    def _stands(
        self, expectation: Expectation, leaf: x509.Certificate, revocations: Revocations
    ) -> bool:
        links = links_of(leaf, expectation.chain[::-1])
        peer = next(map(str, spiffe_ids(leaf)), f"serial {leaf.serial_number:x}")
        expectation.chain.clear()
        standing = Standing(revocations, self.reporter, peer, links)
        if not revocations.accepts(standing):
            expectation.refusal = f"a certificate in the chain of {peer} was revoked"
            expectation.revoked = True
            return False
        expectation.standing = standing
        return True


def _select_alpn(_connection: SSL.Connection, offered: Sequence[bytes]) -> bytes:
    if ALPN_H2 in offered:
        return ALPN_H2
    # pyOpenSSL answers an exception with the fatal alert that RFC 7301 wants;
    # its NO_OVERLAPPING_PROTOCOLS would go on without ALPN.
    raise TlsError("alpn", f"the peer offers {offered!r}, not h2")


def _chain(chain_pem: bytes) -> tuple[x509.Certificate, list[x509.Certificate]]:
    leaf, *intermediates = _certificates(chain_pem, "the workload's certificate chain")
    return leaf, intermediates


def _certificates(pem: bytes, what: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise TlsError("bad-certificate", f"{what} cannot be read: {error}") from error


def _own_identity(leaf: x509.Certificate) -> SpiffeId:
    ids = spiffe_ids(leaf)
    if not ids:
        raise TlsError("bad-certificate", "our own certificate carries no SPIFFE id")
    return ids[0]
