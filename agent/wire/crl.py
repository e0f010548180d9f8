"""Certificate revocation lists: how they are read, and what they say of a peer's chain.

As in ztunnel: every certificate below the trust anchor is looked up in the
lists of its issuer; one of which no list speaks is good, and a list counts
also after its nextUpdate. A list speaks for an issuer only if that issuer's
key signed it: two CAs may share a name, and a file is not a CA.

Lists by deltas and lists for other CAs' certificates (indirect ones) are
refused, since a serial number in them does not mean what it means elsewhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from meshbpf.agent.core.errors import ConfigError
from meshbpf.agent.core.traffic import Reporter
from meshbpf.agent.wire.errors import RevokedError

_PEM_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----.*?-----END \1-----", re.DOTALL)
_PEM_BEGIN = b"-----BEGIN"
_PEM_LABEL = b"X509 CRL"  # RFC 7468, section 6

# What cryptography says of DER that it does not like.
_UNREADABLE = (
    ValueError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)

End = Callable[[RevokedError], None]
"""Ends a tunnel whose peer is trusted no more."""


@dataclass(frozen=True, slots=True, eq=False)
class RevocationList:
    """One list, read."""

    issuer: str
    """As RFC 4514 writes it: encodings of one name may differ between CA and list."""
    serials: frozenset[int]
    signed: x509.CertificateRevocationList
    _believed: dict[x509.Certificate, bool] = field(default_factory=dict)

    def signed_by(self, issuer: x509.Certificate) -> bool:
        """Whether the list is this issuer's own; each is asked once."""
        found = self._believed.get(issuer)
        if found is None:
            found = self._believed[issuer] = self._verify(issuer)
        return found

    def _verify(self, issuer: x509.Certificate) -> bool:
        try:
            # Keys that can sign nothing raise TypeError.
            return self.signed.is_signature_valid(issuer.public_key())  # type: ignore[arg-type]
        except (TypeError, ValueError, UnsupportedAlgorithm):
            return False


@dataclass(frozen=True, slots=True)
class Issuer:
    """A CA in a chain."""

    certificate: x509.Certificate
    name: str

    @classmethod
    def of(cls, certificate: x509.Certificate) -> Issuer:
        """Raises ValueError when its name cannot be read."""
        return cls(certificate, certificate.subject.rfc4514_string())


@dataclass(frozen=True, slots=True)
class Link:
    """One certificate of a chain, and who signed it."""

    serial: int
    issuer: Issuer


def read_lists(content: bytes, origin: str) -> tuple[RevocationList, ...]:
    """The lists of a file: PEM, also several and with other blocks between, or one in DER.

    An empty file has none. Raises ConfigError (bad-crl).
    """
    if not content.strip():
        return ()
    if _PEM_BEGIN not in content:
        return (_read_list(content, x509.load_der_x509_crl, origin),)
    blocks = list(_PEM_BLOCK.finditer(content))
    if len(blocks) != content.count(_PEM_BEGIN):
        raise _bad(origin, "a PEM block does not end")
    return tuple(
        _read_list(block[0], x509.load_pem_x509_crl, origin)
        for block in blocks
        if block[1] == _PEM_LABEL
    )


def _read_list(
    data: bytes, load: Callable[[bytes], x509.CertificateRevocationList], origin: str
) -> RevocationList:
    try:
        found = load(data)
        for extension in found.extensions:
            value = extension.value
            if isinstance(value, x509.IssuingDistributionPoint):
                if value.indirect_crl:
                    raise _bad(origin, "it is an indirect list")
            elif isinstance(value, x509.DeltaCRLIndicator):
                raise _bad(origin, "it is a delta of another list")
            elif extension.critical and isinstance(value, x509.UnrecognizedExtension):
                raise _bad(origin, f"its extension {value.oid.dotted_string} is not known")
        serials = frozenset(revoked.serial_number for revoked in found)
        return RevocationList(found.issuer.rfc4514_string(), serials, found)
    except _UNREADABLE as error:
        raise _bad(origin, str(error)) from error


def _bad(origin: str, why: str) -> ConfigError:
    return ConfigError(
        "bad-crl",
        f"{origin} is no certificate revocation list: {why}",
        "put PEM or DER there, as `openssl ca -gencrl` writes it; what was in force before stays",
    )


def links_of(leaf: x509.Certificate, issuers: Sequence[Issuer]) -> tuple[Link, ...]:
    """What can be revoked of a verified chain: all but its last one, the anchor."""
    chain = (leaf, *(issuer.certificate for issuer in issuers))
    return tuple(
        Link(certificate.serial_number, issuer)
        for certificate, issuer in zip(chain, issuers, strict=False)
    )


@dataclass(frozen=True, slots=True, eq=False)
class Standing:
    """A peer whose chain was good when it shook hands."""

    revocations: Revocations
    reporter: Reporter
    peer: str
    links: tuple[Link, ...]

    @contextmanager
    def watched(self, end: End) -> Iterator[None]:
        """For the time of the block, call `end` once the chain is revoked."""
        with self.revocations.watched(self, end):
            yield


class Revocations:
    """The lists in force, the peers that stand under them, and how many were refused."""

    def __init__(self) -> None:
        self._lists: Mapping[str, tuple[RevocationList, ...]] = {}
        self._watched: dict[Standing, End] = {}
        self.rejected: Counter[Reporter] = Counter()
        """Peers that were refused, and tunnels that were ended."""
        self.untracked: Counter[Reporter] = Counter()
        """Peers with a certificate in their chain that cannot be read: it is looked up nowhere."""

    def replace(self, lists: Iterable[RevocationList]) -> int:
        """Put these in force; ends the tunnels of peers that they revoke and says how many."""
        found: dict[str, tuple[RevocationList, ...]] = {}
        for each in lists:
            found[each.issuer] = (*found.get(each.issuer, ()), each)
        self._lists = found
        gone = [(standing, end) for standing, end in self._watched.items() if self._judge(standing)]
        for standing, end in gone:
            self._end(standing, end)
        return len(gone)

    def accepts(self, standing: Standing) -> bool:
        """Whether a peer that shakes hands is not revoked; a no is counted."""
        if self._judge(standing):
            self.rejected[standing.reporter] += 1
            return False
        return True

    @contextmanager
    def watched(self, standing: Standing, end: End) -> Iterator[None]:
        """For `Standing`."""
        self._watched[standing] = end
        try:
            if self._judge(standing):  # the lists changed since the handshake
                self._end(standing, end)
            yield
        finally:
            self._watched.pop(standing, None)

    def _judge(self, standing: Standing) -> bool:
        return any(
            link.serial in each.serials and each.signed_by(link.issuer.certificate)
            for link in standing.links
            for each in self._lists.get(link.issuer.name, ())
        )

    def _end(self, standing: Standing, end: End) -> None:
        del self._watched[standing]
        self.rejected[standing.reporter] += 1
        end(RevokedError(f"the certificate of {standing.peer} was revoked"))
