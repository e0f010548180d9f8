"""istiod's certificate service as messages."""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf import struct_pb2
from google.protobuf.message import DecodeError

from meshbpf.agent.core.csr import AnswerError
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.wire.pb import citadel_pb2 as pb

METHOD = "istio.v1.auth.IstioCertificateService/CreateCertificate"


@dataclass(frozen=True, slots=True)
class CaAnswer:
    """A certificate and what it comes with; nothing of it is checked yet."""

    chain_pem: bytes
    roots_pem: bytes


def encode(identity: SpiffeId, csr_pem: bytes, validity_s: int, *, impersonated: bool) -> bytes:
    """Ask for `identity`'s certificate.

    `impersonated`: on its behalf, as a node agent does, whose own token names
    another account. Without it the token must be that identity's own.
    """
    request = pb.IstioCertificateRequest(csr=csr_pem.decode("ascii"), validity_duration=validity_s)
    if impersonated:
        metadata = struct_pb2.Struct()
        metadata.update({"ImpersonatedIdentity": str(identity)})
        request.metadata.CopyFrom(metadata)
    return request.SerializeToString()


def decode(identity: SpiffeId, data: bytes) -> CaAnswer:
    """Leaf, intermediates, and as the last element the roots: one or more in one text.

    Raises AnswerError.
    """
    try:
        chain = list(pb.IstioCertificateResponse.FromString(data).cert_chain)
    except DecodeError as error:
        raise AnswerError(identity, f"the answer is none: {error}") from error
    if len(chain) < 2:
        raise AnswerError(identity, f"the answer has {len(chain)} parts: no leaf with roots")
    *certificates, roots = (part.strip() + "\n" for part in chain)
    return CaAnswer("".join(certificates).encode(), roots.encode())
