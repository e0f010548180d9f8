"""Who signs workload certificates, and in which order they are asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import Protocol, runtime_checkable

import trio
from cryptography.hazmat.primitives.asymmetric import ec

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.identity import SpiffeId

AT_ONCE = 8
"""Certificates that are fetched at a time; as ztunnel."""


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate as it was issued."""

    chain_pem: bytes
    """Leaf first, without roots."""
    key: ec.EllipticCurvePrivateKey
    roots_pem: bytes
    """By which peers are judged from now on."""


class Signer(Protocol):
    """What all who sign have in common: the embedded CA, istiod, Kubernetes and SPIRE."""

    remote: bool
    """It takes a while: certificates are worth having before a pod needs them."""

    @property
    def roots_pem(self) -> bytes:
        """The newest bundle; empty until the first certificate where the signer sends it along."""

    async def run(self, renew_all: Callable[[], None]) -> None:
        """What must go on meanwhile; calls `renew_all` when the signer or its roots change."""

    def warnings(self) -> tuple[str, ...]:
        """What is wrong with the signer while the one before serves on, for `status`."""


class Issuer(Signer, Protocol):
    """A signer that is asked, each time that a certificate is wanted."""

    async def issue(self, identity: SpiffeId, not_before: datetime, not_after: datetime) -> Issued:
        """A certificate and its key; the signer may grant less time. Raises MeshbpfError."""


class Holder(Protocol):
    """Who takes the certificates of one identity that a `PushingIssuer` brings."""

    def put(self, issued: Issued) -> None:
        """The newest; in force at once, unless it is the identity's no more."""

    def failed(self, error: MeshbpfError, retry_s: float | None) -> None:
        """None is to be had; what was there stays. Tried again after `retry_s` seconds.

        None: with the signer's next push.
        """


@runtime_checkable
class PushingIssuer(Signer, Protocol):
    """A signer that renews by itself and brings what it has."""

    async def follow(self, identity: SpiffeId, holder: Holder) -> None:
        """Give `holder` all that comes for `identity`, until cancelled; never returns or raises."""


AnyIssuer = Issuer | PushingIssuer


class Priority(IntEnum):
    """Who is served first when more certificates are wanted than are fetched at a time."""

    REAL_TIME = 0
    """A connection waits for it."""
    WARMUP = 1
    """A pod of this node will need it."""
    BACKGROUND = 2
    """A renewal: the old one still serves."""


class Turn:
    """One who waits in a `FetchQueue`; the priority may rise meanwhile."""

    __slots__ = ("_event", "priority")

    def __init__(self, priority: Priority) -> None:
        self.priority = priority
        self._event = trio.Event()

    def raise_to(self, priority: Priority) -> None:
        """At least this urgent from now on."""
        self.priority = min(self.priority, priority)


class FetchQueue:
    """Lets a bounded number fetch at a time: the most urgent first, then who came first."""

    def __init__(self, at_once: int = AT_ONCE) -> None:
        self._free = at_once
        self._waiting: list[Turn] = []

    @asynccontextmanager
    async def slot(self, turn: Turn) -> AsyncIterator[None]:
        """Hold a place for as long as the block lasts."""
        await trio.lowlevel.checkpoint()
        if self._free > 0:
            self._free -= 1
        else:
            self._waiting.append(turn)
            try:
                await turn._event.wait()
            except trio.Cancelled:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                else:
                    self._pass_on()  # the place was ours already
                raise
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        if not self._waiting:
            self._free += 1
            return
        # The first of the most urgent: `min` keeps to the order of arrival.
        following = min(self._waiting, key=lambda turn: turn.priority)
        self._waiting.remove(following)
        following._event.set()
