"""The client's side of delta xDS, without I/O: what was told, what to answer, when to try again.

A stream begins with one request per type, which names the versions that this
client holds already, so that a reconnect brings only what changed meanwhile.
Each push is answered: an ACK, or a NACK that says what is wrong with which
resource, while the good ones of the same push are in force. A refused
resource is not reported as held on the next stream, so it will be sent again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random

ADDRESS = "type.googleapis.com/istio.workload.Address"
AUTHORIZATION = "type.googleapis.com/istio.security.Authorization"
TYPES = (ADDRESS, AUTHORIZATION)
"""In the order in which they are asked for; as ztunnel."""

FIRST_PAUSE_S = 0.01
LAST_PAUSE_S = 15.0
PAUSE_JITTER = 0.2  # ztunnel has none: hundreds of nodes would come back in step


@dataclass(frozen=True, slots=True)
class Request:
    """What to send. The first of a type on a stream opens it."""

    type_url: str
    initial_versions: Mapping[str, str] = field(default_factory=dict)
    nonce: str = ""
    error: str = ""
    """Makes it a NACK."""


@dataclass(frozen=True, slots=True)
class Resource:
    """One resource of a push, still packed."""

    name: str
    version: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Push:
    """What the server told."""

    type_url: str
    nonce: str
    resources: tuple[Resource, ...] = ()
    removed: tuple[str, ...] = ()


class DeltaMachine:
    """What this client holds of each type, over all its streams."""

    def __init__(self) -> None:
        self._held: dict[str, dict[str, str]] = {url: {} for url in TYPES}
        self._awaited = set(TYPES)
        self.refused: dict[str, str] = {}
        """By name, what is wrong with resources whose newest version is not in force."""

    @property
    def ready(self) -> bool:
        """Whether every type has been received and, but for bad resources, accepted once."""
        return not self._awaited

    def holds(self, type_url: str, name: str) -> bool:
        """Whether some version of a resource is in force."""
        return name in self._held[type_url]

    def opening(self) -> list[Request]:
        """What a new stream begins with."""
        return [Request(url, dict(self._held[url])) for url in TYPES]

    def answer(self, push: Push, refused: Mapping[str, str], kept: Collection[str] = ()) -> Request:
        """Note what `push` brought, and answer it.

        `refused` says by name what is wrong with those that are not in force;
        under the empty name, what is wrong with the push as a whole. Those of
        `kept` stand in some other form, so that their removal must be told.
        """
        held = self._held.get(push.type_url)
        if held is None:
            return Request(push.type_url, nonce=push.nonce, error="not a type that was asked for")
        whole = "" in refused
        for name in push.removed:
            if not whole:
                held.pop(name, None)
                self.refused.pop(name, None)
        for one in push.resources:
            if one.name in kept and not whole:
                held[one.name] = ""  # no version: it will be sent again
                continue
            if whole or one.name in refused:
                # Held at an older version perhaps; claiming that one will bring the new one again.
                continue
            held[one.name] = one.version
            self.refused.pop(one.name, None)
        if not whole:
            self._awaited.discard(push.type_url)
            self.refused.pop("", None)
        if refused:
            self.refused.update(refused)
            error = "; ".join(f"{name}: {why}" if name else why for name, why in refused.items())
            return Request(push.type_url, nonce=push.nonce, error=error)
        return Request(push.type_url, nonce=push.nonce)


class Ending(StrEnum):
    """How a stream ended; the names are those of istio_xds_connection_terminations_total."""

    CONNECTION_ERROR = "ConnectionError"
    """No stream came about."""
    ERROR = "Error"
    RECONNECT = "Reconnect"
    """The server asked for it: it closes streams from time to time, or restarts."""
    COMPLETE = "Complete"
    """It ended well."""


class Backoff:
    """How long to wait before the next stream."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._pause_s = FIRST_PAUSE_S

    def after(self, ending: Ending, *, useful: bool) -> float:
        """Seconds to wait; `useful` says whether the stream brought anything.

        A server that ends stream after stream at once is treated as one that
        fails, however politely it does so.
        """
        if useful and ending in (Ending.RECONNECT, Ending.COMPLETE):
            self._pause_s = FIRST_PAUSE_S
            if ending is Ending.COMPLETE:
                return 0.0
        else:
            self._pause_s = min(LAST_PAUSE_S, 2 * self._pause_s)
        return self._pause_s * (1 + self._rng.uniform(-PAUSE_JITTER, PAUSE_JITTER))
