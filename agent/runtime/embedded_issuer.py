"""The embedded CA as a signer: a folder (ca_files.py) that is read again when it changes.

So a CA is rotated as Istio's `cacerts` are, with no restart: put the new root
beside the old one into root-cert.pem everywhere, then the new issuing
certificate and key, then take the old root away. Each step is in force on
every node within POLL_S and the spread of the renewals; tunnels that stand
stay. A folder that is bad, half written or of another trust domain changes
nothing: the CA of before signs on, and `status` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import trio

from meshbpf.agent import ca_files
from meshbpf.agent.core.ca import CertificateAuthority, new_key
from meshbpf.agent.core.errors import ConfigError, MeshbpfError
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.runtime.file_signature import Signature, read_when_still, signature_of
from meshbpf.agent.runtime.issuing import Issued
from meshbpf.agent.runtime.logs import Log

POLL_S = 2.0

log = Log("ca")


class EmbeddedIssuer:
    """An `Issuer` over a CA in this process. Raises as `ca_files.load` does."""

    remote = False

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._seen = self._look()
        self._authority = ca_files.load(directory)
        self._error: MeshbpfError | None = None

    @property
    def roots_pem(self) -> bytes:
        """The trust bundle."""
        return self._authority.roots_pem

    @property
    def trust_domain(self) -> str:
        """That of the CA; empty where its certificate names none."""
        return self._authority.trust_domain or ""

    def warnings(self) -> tuple[str, ...]:
        """Why the CA in the folder is not in force."""
        return (f"CA folder: {self._error.what}",) if self._error is not None else ()

    async def run(self, renew_all: Callable[[], None]) -> None:
        """Follow the folder, until cancelled."""
        while True:
            await trio.sleep(POLL_S)
            found = await trio.to_thread.run_sync(self._look)
            if found == self._seen:
                continue
            try:
                authority = await read_when_still(self._look, found, self._read)
            except MeshbpfError as error:
                if self._look() == found:
                    self._seen = found
                    self._refuse(error)
                continue
            if authority is not None:
                self._seen = found
                self._accept(authority, renew_all)

    async def issue(self, identity: SpiffeId, not_before: datetime, not_after: datetime) -> Issued:
        """Takes well under a millisecond with a P-256 CA."""
        await trio.lowlevel.checkpoint()
        key = new_key()
        chain = self._authority.issue(identity, key.public_key(), not_before, not_after)
        return Issued(chain, key, self.roots_pem)

    def _look(self) -> tuple[Signature | None, ...]:
        return tuple(signature_of(self._directory / name) for name in ca_files.NAMES)

    def _read(self) -> CertificateAuthority:
        authority = ca_files.load(self._directory)
        before, now = self._authority.trust_domain, authority.trust_domain
        if before is not None and now is not None and before != now:
            raise ConfigError(
                "other-trust-domain",
                f"{self._directory} holds a CA for {now}; this process serves {before}",
                "put the CA of before back, or restart to change the trust domain",
            )
        return authority

    def _accept(self, authority: CertificateAuthority, renew_all: Callable[[], None]) -> None:
        if self._error is not None:
            self._error = None
            log.info("CA folder is good again", directory=self._directory)
        if (authority.chain, authority.roots) == (self._authority.chain, self._authority.roots):
            return
        self._authority = authority
        log.warning(
            "the CA has changed: certificates are renewed",
            directory=self._directory,
            issuer=authority.issuer.subject.rfc4514_string(),
            roots=len(authority.roots),
        )
        renew_all()

    def _refuse(self, error: MeshbpfError) -> None:
        self._error = error
        log.error("CA folder not read, the CA of before signs on", cause=error)
