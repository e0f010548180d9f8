"""SPIRE's Delegated Identity API as messages: X.509-SVIDs and bundles of X.509 roots.

Source: spire-api-sdk, spire/api/agent/delegatedidentity/v1/delegatedidentity.proto,
and for what an agent really sends pkg/agent/api/delegatedidentity/v1/service.go of SPIRE.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.message import DecodeError

from meshbpf.agent.core.csr import AnswerError, check_answer
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.identity import SCHEME, SpiffeId
from meshbpf.agent.wire.pb import delegated_identity_pb2 as pb

_SERVICE = "spire.api.agent.delegatedidentity.v1.DelegatedIdentity/"
SVIDS = _SERVICE + "SubscribeToX509SVIDs"
BUNDLES = _SERVICE + "SubscribeToX509Bundles"


class SpireError(MeshbpfError):
    """What a SPIRE agent has not, or does not give."""


def selectors(identity: SpiffeId) -> tuple[tuple[str, str], ...]:
    """Type and value of what SPIRE's k8s attestor finds at every pod of that account."""
    return (("k8s", f"ns:{identity.namespace}"), ("k8s", f"sa:{identity.service_account}"))


def svids_request(identity: SpiffeId) -> bytes:
    """Subscribe to what entries have for pods of `identity`'s account."""
    asked = [pb.Selector(type=kind, value=value) for kind, value in selectors(identity)]
    return pb.SubscribeToX509SVIDsRequest(selectors=asked).SerializeToString()


def bundles_request() -> bytes:
    """Subscribe to the roots."""
    return pb.SubscribeToX509BundlesRequest().SerializeToString()


def svid(
    identity: SpiffeId, data: bytes, now: datetime
) -> tuple[bytes, ec.EllipticCurvePrivateKey]:
    """Chain (PEM, leaf first) and key of `identity`, among all that an update has.

    An agent sends one SVID for each entry whose selectors are among those
    asked for, so others may stand beside it. Raises SpireError when there is
    no such entry, AnswerError when what it sends cannot be used.
    """
    try:
        found = pb.SubscribeToX509SVIDsResponse.FromString(data).x509_svids
    except DecodeError as error:
        raise AnswerError(identity, f"the SPIRE agent's update is none: {error}") from error
    by_id = {_id_of(one): one for one in reversed(found)}  # the first of several counts
    if str(identity) not in by_id:
        raise _no_entry(identity, sorted(by_id))
    return _checked(identity, by_id[str(identity)], now)


def _id_of(one: pb.X509SVIDWithKey) -> str:
    return SCHEME + one.x509_svid.id.trust_domain + one.x509_svid.id.path


def _no_entry(identity: SpiffeId, others: list[str]) -> SpireError:
    which = " ".join(f"-selector {kind}:{value}" for kind, value in selectors(identity))
    what = f"the SPIRE agent has no registration entry for {identity}"
    if others:
        what += f"; for pods of that account it has {', '.join(others)}"
    return SpireError(
        "no-registration-entry",
        what,
        f"create it: spire-server entry create -spiffeID {identity} -parentID AGENT-OR-NODE-ID "
        f"{which}; an entry with further selectors is not found",
    )


def _checked(
    identity: SpiffeId, one: pb.X509SVIDWithKey, now: datetime
) -> tuple[bytes, ec.EllipticCurvePrivateKey]:
    try:
        chain = [x509.load_der_x509_certificate(der) for der in one.x509_svid.cert_chain]
        key = serialization.load_der_private_key(one.x509_svid_key, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise AnswerError(identity, f"the SPIRE agent's SVID cannot be read: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SpireError(
            "unsupported-key",
            f"the key of {identity} is no elliptic curve's",
            'set workload_x509_svid_key_type = "ec-p256" in the SPIRE agent\'s configuration',
        )
    chain_pem = b"".join(each.public_bytes(serialization.Encoding.PEM) for each in chain)
    check_answer(identity, key, chain_pem, now)
    return chain_pem, key


def roots(trust_domain: str, data: bytes) -> bytes:
    """The roots of `trust_domain` as PEM; federated bundles are left out. Raises SpireError."""
    try:
        bundles = pb.SubscribeToX509BundlesResponse.FromString(data).ca_certificates
        found = bundles.get(SCHEME + trust_domain, b"")
        pem = b"".join(
            x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)
            for der in _split(found)
        )
    except (DecodeError, ValueError) as error:
        raise SpireError(
            "bad-bundle",
            f"the SPIRE agent's bundle of {trust_domain} cannot be read: {error}",
            "see what it has with `spire-server bundle show`",
        ) from error
    if not pem:
        there = (
            ", ".join(sorted(name.removeprefix(SCHEME) for name in bundles)) or "no trust domain"
        )
        raise SpireError(
            "no-bundle",
            f"the SPIRE agent has no roots of trust domain {trust_domain}, but of {there}",
            "give `meshbpf run --trust-domain` the trust domain of the SPIRE server",
        )
    return pem


def _split(certificates: bytes) -> Iterator[bytes]:
    """DER certificates that stand one behind the other. Raises ValueError.

    Each is a SEQUENCE (0x30) whose length has one byte, or a count of bytes
    and so many of them (X.690, section 8.1.3).
    """
    while certificates:
        head = 2
        if len(certificates) < head or certificates[0] != 0x30:
            raise ValueError("no DER certificate where one should begin")
        size = certificates[1]
        if size & 0x80:
            head += size & 0x7F
            size = int.from_bytes(certificates[2:head], "big")
        if len(certificates) < head + size:
            raise ValueError("a certificate is cut off")
        yield certificates[: head + size]
        certificates = certificates[head + size :]
