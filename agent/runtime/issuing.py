"""Who signs workload certificates, and in which order they are asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import Protocol

import trio
from cryptography.hazmat.primitives.asymmetric import ec

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


class Issuer(Protocol):
    """Who signs: the embedded CA, istiod, Kubernetes or SPIRE."""

    remote: bool
    """It takes a while: certificates are worth having before a pod needs them."""

    @property
    def roots_pem(self) -> bytes:
        """The newest bundle; empty until the first certificate where the signer sends it along."""

    async def run(self, renew_all: Callable[[], None]) -> None:
        """What must go on meanwhile; calls `renew_all` when the signer or its roots change."""

    def warnings(self) -> tuple[str, ...]:
        """What is wrong with the signer while the one before serves on, for `status`."""

    async def issue(self, identity: SpiffeId, not_before: datetime, not_after: datetime) -> Issued:
        """A certificate and its key; the signer may grant less time. Raises MeshbpfError."""


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
