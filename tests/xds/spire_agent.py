"""A SPIRE agent for tests: the Delegated Identity API on a unix socket, which can misbehave.

It keeps entries (SPIFFE ids by account) and pushes to every subscription what
changes, as spire-agent does; certificates are of the project's own CA, real.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trio
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from meshbpf.agent.core import ca
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.wire import spire
from meshbpf.agent.wire.pb import delegated_identity_pb2 as pb
from tests.unit.runtime.grpc_server import Server, ServerCall, serving

DOMAIN = "example.org"
LIFE = timedelta(hours=1)


def utc_now() -> datetime:
    return datetime.now(UTC)


def der(pem: bytes) -> list[bytes]:
    return [
        one.public_bytes(serialization.Encoding.DER) for one in x509.load_pem_x509_certificates(pem)
    ]


@dataclass(slots=True, eq=False)
class SpireAgent:
    """The server's state, which tests change as they go."""

    authority: ca.CertificateAuthority
    svids: dict[tuple[str, str], list[pb.X509SVIDWithKey]] = field(default_factory=dict)
    """By namespace and account."""
    bundles: dict[str, bytes] = field(default_factory=dict)
    refusal: tuple[int, str] | None = None
    silent: bool = False
    """Entries are there, but nothing is signed yet."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    subscriptions: list[ServerCall] = field(default_factory=list)
    changed: trio.Event = field(default_factory=trio.Event)

    def push(self) -> None:
        """What was changed is told to all."""
        self.changed.set()
        self.changed = trio.Event()

    def svid(self, identity: SpiffeId, *, shown: SpiffeId | None = None) -> pb.X509SVIDWithKey:
        """A new one; `shown` is the id that stands beside a certificate of `identity`."""
        shown = shown or identity
        key = ca.new_key()
        now = utc_now()
        chain = self.authority.issue(identity, key.public_key(), now - LIFE, now + LIFE)
        return pb.X509SVIDWithKey(
            x509_svid=pb.X509SVID(
                cert_chain=der(chain),
                id=pb.SPIFFEID(
                    trust_domain=shown.trust_domain,
                    path=f"/ns/{shown.namespace}/sa/{shown.service_account}",
                ),
                expires_at=int((now + LIFE).timestamp()),
            ),
            x509_svid_key=key.private_bytes(
                serialization.Encoding.DER,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        )

    def entry(self, identity: SpiffeId) -> None:
        """Create it, or rotate what it has."""
        account = (identity.namespace, identity.service_account)
        self.svids[account] = [self.svid(identity)]
        self.push()

    def trust(self, *authorities: ca.CertificateAuthority) -> None:
        """The bundle of our own trust domain, and beside it one that is federated."""
        roots = b"".join(b"".join(der(one.roots_pem)) for one in authorities)
        foreign = b"".join(der(ca.create("far.example", utc_now()).roots_pem))
        self.bundles = {f"spiffe://{DOMAIN}": roots, "spiffe://far.example": foreign}
        self.push()

    async def serve_svids(self, call: ServerCall) -> None:
        request = pb.SubscribeToX509SVIDsRequest.FromString(await call.request())
        if await self._refused(call):
            return
        assert request.pid == 0
        assert {one.type for one in request.selectors} == {"k8s"}
        values = dict(one.value.split(":", 1) for one in request.selectors)
        account = (values["ns"], values["sa"])
        self.asked.append(account)
        self.subscriptions.append(call)
        if self.silent:
            await trio.sleep_forever()
        await call.start()
        while True:
            changed = self.changed
            answer = pb.SubscribeToX509SVIDsResponse(x509_svids=self.svids.get(account, []))
            await call.send(answer.SerializeToString())
            await changed.wait()

    async def serve_bundles(self, call: ServerCall) -> None:
        await call.request()
        if await self._refused(call):
            return
        await call.start()
        while True:
            changed = self.changed
            answer = pb.SubscribeToX509BundlesResponse(ca_certificates=self.bundles)
            await call.send(answer.SerializeToString())
            await changed.wait()

    async def _refused(self, call: ServerCall) -> bool:
        if self.refusal is None:
            return False
        status, message = self.refusal
        await call.end(
            (":status", "200"),
            ("content-type", "application/grpc"),
            ("grpc-status", str(status)),
            ("grpc-message", message),
        )
        return True

    @asynccontextmanager
    async def listening(self, path: Path) -> AsyncIterator[Server]:
        handlers = {spire.SVIDS: self.serve_svids, spire.BUNDLES: self.serve_bundles}
        async with serving(path, handlers) as server:
            yield server


def new_agent() -> SpireAgent:
    agent = SpireAgent(ca.create(DOMAIN, utc_now()))
    agent.trust(agent.authority)
    return agent
