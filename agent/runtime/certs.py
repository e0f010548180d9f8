"""The certificates of the identities on this node: made, renewed at half-life, forgotten.

An identity is held by the pods that run under it; the first one starts its
task, the last one ends it, so that this node never asks for an account that
is not on it. Keys are made here, live in memory only, and change with each
certificate. A renewal replaces the TLS contexts that new tunnels ask for;
tunnels that stand keep the contexts they began with, so nothing is dropped.

A renewal that fails is tried again with growing pauses, while the old
certificate serves until its very end.

A signer that renews by itself (SPIRE) is followed instead: a subscription per
identity, and what it brings is in force at once.

When the signer's bundle of roots changes, all contexts are made anew with it
and all certificates that we ask for are renewed, those first that somebody waits for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from meshbpf.agent.api import CertInfo, CertsResult, CertState
from meshbpf.agent.core.ca import anchor_of
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.runtime.control import error_body
from meshbpf.agent.runtime.issuing import (
    AnyIssuer,
    FetchQueue,
    Issued,
    Issuer,
    Priority,
    PushingIssuer,
    Turn,
)
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.wire.crl import Revocations
from meshbpf.agent.wire.tls import WorkloadTls, workload_tls

CLOCK_SKEW = timedelta(seconds=60)
"""Certificates begin this much in the past: the peer's clock may be behind."""
SHORTEST_LIFE = timedelta(seconds=1)
RETRY_FIRST_S = 1.0
RETRY_LAST_S = 150.0
RETRY_JITTER = 0.2  # the three as ztunnel's
HURRY_SPREAD_S = 2.0
"""A change of roots is followed by renewals spread over this time."""
_LONGEST_SLEEP_S = 30.0
"""Renewal follows the wall clock, which may be set; so it is looked at this often."""

log = Log("certs")


@dataclass(slots=True, eq=False)
class _Held:
    """One identity and what is known of its certificate."""

    identity: SpiffeId
    pods: set[str] = field(default_factory=set)
    expected: set[str] = field(default_factory=set)
    """Workloads of this node, by uid, that may become its pods."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    attempted: trio.Event = field(default_factory=trio.Event)
    """Set at the end of the next attempt, then replaced."""
    turn: Turn = field(default_factory=lambda: Turn(Priority.WARMUP))
    """The next fetch's, or the one's under way."""
    hurry: trio.Event = field(default_factory=trio.Event)
    """Set to renew before the time."""
    tls: WorkloadTls | None = None
    key: ec.EllipticCurvePrivateKey | None = None
    chain_pem: bytes = b""
    serial: str = ""
    renew_at: datetime | None = None
    error: MeshbpfError | None = None
    """Why the newest attempt failed."""


@dataclass(frozen=True, slots=True)
class HeldCertificate:
    """One identity with its certificates, leaf first; never its key."""

    identity: str
    chain_pem: bytes
    """Empty while there is none."""
    error: str
    """Why the newest attempt failed."""


@dataclass(frozen=True, slots=True)
class CertificateStatistics:
    """Counters since the start."""

    identities: int
    issued: int
    failed: int


def utc_now() -> datetime:
    """The wall clock."""
    return datetime.now(UTC)


class CertificateStore:
    """Implements the forwarder's `Identities`."""

    def __init__(
        self,
        issuer: AnyIssuer | None,
        nursery: trio.Nursery,
        *,
        ttl: timedelta,
        now: Callable[[], datetime] = utc_now,
        rng: random.Random | None = None,
        revocations: Revocations | None = None,
    ) -> None:
        self._revocations = revocations
        self._issuer = issuer
        self._nursery = nursery
        self._ttl = ttl
        self._now = now
        self._rng = rng or random.Random()  # noqa: S311 (jitter, no secret)
        self._held: dict[SpiffeId, _Held] = {}
        self._queue = FetchQueue()
        self._roots_pem = issuer.roots_pem if issuer is not None else b""
        self._issued = self._failed = 0

    def hold(self, identity: SpiffeId, pod: str) -> None:
        """`pod` (NS/NAME) runs under `identity`: see that it has a certificate.

        Nothing where there is no issuer: then another proxy has them.
        """
        if self._issuer is None:
            return
        self._wanted(identity).pods.add(pod)

    def release(self, identity: SpiffeId, pod: str) -> None:
        """`pod` is gone. The last holder takes key and certificate with it."""
        if held := self._held.get(identity):
            held.pods.discard(pod)
            self._drop_unused(held)

    def expect(self, identity: SpiffeId, uid: str) -> None:
        """The mesh has workload `uid` on this node: have its certificate when its pod comes."""
        self._wanted(identity).expected.add(uid)

    def forget(self, identity: SpiffeId, uid: str) -> None:
        """The workload is gone; its certificate too, when no other and no pod needs it."""
        if held := self._held.get(identity):
            held.expected.discard(uid)
            self._drop_unused(held)

    def renew_all(self) -> None:
        """The signer or its roots change: do not wait for half-life."""
        if self._issuer is not None and (roots_pem := self._issuer.roots_pem):
            self._follow_roots(roots_pem)
        for held in self._held.values():
            held.hurry.set()

    def _wanted(self, identity: SpiffeId) -> _Held:
        held = self._held.get(identity)
        if held is None:
            held = self._held[identity] = _Held(identity)
            self._nursery.start_soon(self._have, held, name=f"certificate of {identity}")
        return held

    def _drop_unused(self, held: _Held) -> None:
        if not held.pods and not held.expected:
            del self._held[held.identity]
            held.scope.cancel()

    async def tls(self, identity: SpiffeId) -> WorkloadTls:
        """The contexts in force; waits for the first attempt when none was made yet.

        Raises MeshbpfError: not an identity of this node, no certificate to
        be had, or an expired one. Cancelling the wait disturbs nobody.
        """
        while True:
            held = self._held.get(identity)
            if held is None:
                raise MeshbpfError("identity-not-here", f"no pod of this node runs as {identity}")
            if held.tls is not None:
                if self._now() < held.tls.not_after:
                    return held.tls
                raise MeshbpfError(
                    "certificate-expired",
                    f"the certificate of {identity} has expired",
                    held.error.what if held.error else "",
                )
            if held.error is not None:
                raise held.error
            held.turn.raise_to(Priority.REAL_TIME)
            await held.attempted.wait()

    def describe(self) -> CertsResult:
        """What the `certs` verb answers."""
        roots = x509.load_pem_x509_certificates(self._roots_pem) if self._roots_pem else []
        certs = [self._info(held, roots) for held in self._held.values()]
        return CertsResult(
            certs=tuple(sorted(certs, key=lambda cert: cert.identity)),
            roots=tuple(map(_fingerprint, roots)),
        )

    def held(self) -> list[HeldCertificate]:
        """Every identity of this node, for whoever shows certificates whole."""
        return [
            HeldCertificate(
                str(one.identity), one.chain_pem, one.error.what if one.error is not None else ""
            )
            for one in self._held.values()
        ]

    @property
    def roots_pem(self) -> bytes:
        """What peers are judged by; empty while no signer has said."""
        return self._roots_pem

    def warnings(self) -> list[str]:
        """What is wrong with the signer and with single certificates, for `status`."""
        found = list(self._issuer.warnings()) if self._issuer is not None else []
        for one in self._held.values():
            if one.error is not None:
                found.append(f"certificate of {one.identity}: {one.error.what}")
        return found

    def statistics(self) -> CertificateStatistics:
        """Counters since the start."""
        return CertificateStatistics(len(self._held), self._issued, self._failed)

    def _info(self, held: _Held, roots: Sequence[x509.Certificate]) -> CertInfo:
        chain = x509.load_pem_x509_certificates(held.chain_pem) if held.chain_pem else []
        anchor = anchor_of(chain, roots)
        return CertInfo(
            identity=str(held.identity),
            state=self._state(held),
            serial=held.serial,
            root=_fingerprint(anchor) if anchor is not None else "",
            not_before=held.tls.not_before if held.tls else None,
            not_after=held.tls.not_after if held.tls else None,
            renew_at=held.renew_at,
            pods=tuple(sorted(held.pods)),
            error=error_body(held.error) if held.error else None,
        )

    def _state(self, held: _Held) -> CertState:
        if held.tls is None:
            return "failed" if held.error else "pending"
        if self._now() >= held.tls.not_after:
            return "expired"
        return "renewing" if held.error else "valid"

    async def _have(self, held: _Held) -> None:
        """See that there is a certificate, until released."""
        assert self._issuer is not None  # noqa: S101 (without one nothing is held)
        with held.scope:
            if isinstance(self._issuer, PushingIssuer):
                await self._issuer.follow(held.identity, _Inlet(self, held))
            else:
                await self._keep(held, self._issuer)

    async def _keep(self, held: _Held, issuer: Issuer) -> None:
        """Get a certificate and renew it at half its life."""
        failures = 0
        while True:
            # Before the attempt: what changes while it runs asks for another.
            held.hurry = trio.Event()
            try:
                await self._obtain(held, issuer)
            except MeshbpfError as error:
                failures += 1
                pause_s = self._retry_pause_s(failures, held)
                self._fail(held, error, pause_s)
                wake_at = self._now() + timedelta(seconds=pause_s)
            else:
                failures = 0
                assert held.renew_at is not None  # noqa: S101 (_obtain set it)
                wake_at = held.renew_at
            held.turn = Turn(Priority.WARMUP if held.tls is None else Priority.BACKGROUND)
            with trio.CancelScope() as pause:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_cancel_when, held.hurry, pause)
                    await self._sleep_until(wake_at)
                    nursery.cancel_scope.cancel()
            if pause.cancelled_caught:
                # Every identity of every node is told at once.
                await trio.sleep(self._rng.uniform(0, HURRY_SPREAD_S))

    async def _obtain(self, held: _Held, issuer: Issuer) -> None:
        async with self._queue.slot(held.turn):
            started = self._now()
            issued = await issuer.issue(held.identity, started - CLOCK_SKEW, started + self._ttl)
        tls = self._install(held, issued)
        # The issuer may grant less than was asked for; near its own end so
        # much less that half of it must not become a busy loop.
        held.renew_at = started + max((tls.not_after - started) / 2, SHORTEST_LIFE)

    def _install(self, held: _Held, issued: Issued) -> WorkloadTls:
        """From the next tunnel on it is in force. Raises MeshbpfError, and the old one stays."""
        tls = workload_tls(issued.chain_pem, issued.key, issued.roots_pem, self._revocations)
        if tls.identity != held.identity:
            raise MeshbpfError(
                "wrong-certificate", f"asked for {held.identity}, the CA answered {tls.identity}"
            )
        renewed = held.tls is not None
        held.tls = tls
        held.key, held.chain_pem = issued.key, issued.chain_pem
        held.serial = f"{x509.load_pem_x509_certificate(issued.chain_pem).serial_number:x}"
        held.error = None
        self._issued += 1
        self._follow_roots(issued.roots_pem, new=held)
        log.info(
            "certificate renewed" if renewed else "certificate issued",
            identity=held.identity,
            serial=held.serial,
            not_after=tls.not_after.isoformat(),
        )
        _attempted(held)
        return tls

    def _fail(self, held: _Held, error: MeshbpfError, retry_s: float | None) -> None:
        self._failed += 1
        held.error = error
        retry = {} if retry_s is None else {"retry_s": round(retry_s, 1)}
        log.error("certificate not issued", cause=error, identity=held.identity, **retry)
        _attempted(held)

    def _follow_roots(self, roots_pem: bytes, new: _Held | None = None) -> None:
        """The newest bundle counts for all identities, from their next tunnel on.

        `new` came with it and needs no other.
        """
        if roots_pem == self._roots_pem:
            return
        first, self._roots_pem = not self._roots_pem, roots_pem
        if first:
            return
        pushed = isinstance(self._issuer, PushingIssuer)
        follows = "new tunnels go by them" if pushed else "certificates are renewed"
        log.warning(f"the CA's roots have changed: {follows}")
        for held in self._held.values():
            if held.key is not None:
                held.tls = workload_tls(held.chain_pem, held.key, roots_pem, self._revocations)
            if held is not new:
                held.hurry.set()

    def _retry_pause_s(self, failures: int, held: _Held) -> float:
        pause_s = min(RETRY_LAST_S, RETRY_FIRST_S * 2.0 ** min(failures - 1, 16))
        pause_s *= 1 + self._rng.uniform(-RETRY_JITTER, RETRY_JITTER)
        if held.tls is not None:
            # Once more before the old one ends, however long the pauses have grown.
            left_s = (held.tls.not_after - self._now()).total_seconds()
            if left_s > 2 * RETRY_FIRST_S:
                pause_s = min(pause_s, left_s - RETRY_FIRST_S)
        return pause_s

    async def _sleep_until(self, moment: datetime) -> None:
        # No event tells that the wall clock was set.
        while (left_s := (moment - self._now()).total_seconds()) > 0:  # noqa: ASYNC110
            await trio.sleep(min(left_s, _LONGEST_SLEEP_S))
        await trio.lowlevel.checkpoint()


@dataclass(frozen=True, slots=True)
class _Inlet:
    """The `Holder` of one identity: what is pushed goes into the store."""

    store: CertificateStore
    held: _Held

    def put(self, issued: Issued) -> None:
        """In force from the next tunnel on, unless it is for somebody else."""
        held = self.held
        if issued.chain_pem == held.chain_pem and issued.roots_pem == self.store.roots_pem:
            held.error = None  # a subscription begins with what is there
            return
        try:
            self.store._install(held, issued)
        except MeshbpfError as error:
            self.failed(error, None)

    def failed(self, error: MeshbpfError, retry_s: float | None) -> None:
        """What is there serves to its end."""
        self.store._fail(self.held, error, retry_s)


def _attempted(held: _Held) -> None:
    held.attempted.set()
    held.attempted = trio.Event()


async def _cancel_when(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


def _fingerprint(certificate: x509.Certificate) -> str:
    return certificate.fingerprint(hashes.SHA256()).hex()
