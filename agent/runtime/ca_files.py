"""The embedded CA as the certificate store's issuer; its files are `meshbpf.agent.ca_files`."""

from __future__ import annotations

from datetime import datetime

import trio
from cryptography.hazmat.primitives.asymmetric import ec

from meshbpf.agent.ca_files import describe, import_files, init, load, show
from meshbpf.agent.core.ca import CertificateAuthority
from meshbpf.agent.core.identity import SpiffeId

__all__ = ["EmbeddedIssuer", "describe", "import_files", "init", "load", "show"]


class EmbeddedIssuer:
    """The certificate store's `Issuer` over a CA in this process."""

    def __init__(self, authority: CertificateAuthority) -> None:
        self._authority = authority
        self._roots_pem = authority.roots_pem

    @property
    def roots_pem(self) -> bytes:
        """The trust bundle."""
        return self._roots_pem

    async def issue(
        self,
        identity: SpiffeId,
        public_key: ec.EllipticCurvePublicKey,
        not_before: datetime,
        not_after: datetime,
    ) -> bytes:
        """A PEM chain, leaf first; takes well under a millisecond with a P-256 CA."""
        await trio.lowlevel.checkpoint()
        return self._authority.issue(identity, public_key, not_before, not_after)
