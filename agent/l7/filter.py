"""What a filter is: a decision in the path of every request, without I/O.

    class Stamp(Filter):
        phase = Phase.BUILT_IN

        def on_request(self, exchange):
            exchange.request.headers.set("x-stamp", "1")
            return CONTINUE

        def on_end(self, exchange):
            count(exchange.response.status if exchange.response else 0)

A hook returns an Outcome: CONTINUE, or a Reply that ends the request there.
A hook that must wait for something is a generator instead: it yields a
Command and is sent the answer, as often as it likes, and returns its Outcome:

        def on_request(self, exchange):
            answer = yield Call(self.authorizer, head, b"", timeout_s=0.6)
            if isinstance(answer, CallFailed) or answer.head.status != 200:
                return Reply(403, b"denied")
            return CONTINUE

The driver performs commands; it throws nothing into a generator but
GeneratorExit, when the client has gone. A hook that raises is a fault of
ours: the request is answered 500 and the fault logged, so whoever may fail
must decide its own fail mode.

Order of `on_request`: by phase, as Istio's waypoint has it, then as compiled.
`on_response` runs in the reverse order, from the filter nearest the router
outwards, for upstream answers and for the Reply of a filter alike (then only
of the filters that the request had passed, and the one that replied).
`on_end` runs once for each exchange whose head arrived, whatever became of
it, also for those that were cut; it must not fail and cannot wait.
`on_connect` judges an opaque TCP connection, before anything is dialed.

Only hooks that a class overrides cost anything.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from meshbpf.agent.core.authority import Authority
from meshbpf.agent.l7.exchange import Connection, Exchange
from meshbpf.agent.l7.message import RequestHead, ResponseHead


class Phase(IntEnum):
    """Where in the order a filter stands (Istio's `listener_waypoint.go`)."""

    CALLER = 10  # X-Forwarded-Client-Cert, X-Forwarded-For
    CUSTOM = 20  # ext_authz
    WASM_AUTHN = 30
    JWT = 40  # RequestAuthentication
    WASM_AUTHZ = 50
    AUTHORIZATION = 60  # AUDIT, DENY, ALLOW
    BUILT_IN = 70  # rate limits
    WASM_STATS = 80
    WASM = 90  # without a phase
    STATS = 100  # metrics, access log, spans


@dataclass(frozen=True, slots=True)
class Continue:
    """Go on."""


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer this now; nothing goes upstream. On a TCP connection: close it.

    `detail` becomes the exchange's response code detail; a gRPC request is
    given the status as gRPC has it, by the driver.
    """

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    detail: str = ""


CONTINUE = Continue()
Outcome = Continue | Reply


@dataclass(frozen=True, slots=True)
class ReadBody:
    """Wait for the body, up to `limit_bytes` of it; answered by a Body.

    In `on_request` the request's, in `on_response` the response's.
    """

    limit_bytes: int


@dataclass(frozen=True, slots=True)
class SetBody:
    """Send this body instead, whole; answered by None. The driver sees to content-length."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Call:
    """Ask a service of the mesh, or a host outside; answered by a CallAnswer or CallFailed.

    `target` is found as a client in the waypoint's namespace would find it:
    in the mesh through HBONE, else by DNS. `http2` for gRPC. `tls` for https.
    """

    target: Authority
    head: RequestHead
    body: bytes = b""
    timeout_s: float = 5.0
    http2: bool = False
    tls: bool = False
    limit_bytes: int = 1024 * 1024
    """A longer answer counts as failed."""
    guarded: bool = False
    """An object's author chose the target: the driver refuses addresses for
    which `authn.uris.refused_address` has a reason, after resolving a name."""


Command = ReadBody | SetBody | Call


@dataclass(frozen=True, slots=True)
class Body:
    """`complete` False: the limit was reached first; what there is will still be sent on."""

    data: bytes
    complete: bool


@dataclass(frozen=True, slots=True)
class CallAnswer:
    """A response; gRPC's status is in the head's trailers."""

    head: ResponseHead
    body: bytes


@dataclass(frozen=True, slots=True)
class CallFailed:
    """No response: why, in words."""

    reason: str


Steps = Generator[Command, Any, Outcome]


class Filter:
    """Base of all filters. Override what is needed; see the module."""

    phase: Phase = Phase.BUILT_IN
    name: str = ""
    """What `explain` and logs call it; the object's NAMESPACE/NAME where it comes from one."""

    def on_connect(self, connection: Connection) -> Outcome | Steps:
        """Judge an opaque connection."""
        return CONTINUE

    def on_request(self, exchange: Exchange) -> Outcome | Steps:
        """Judge or edit a request, head first."""
        return CONTINUE

    def on_response(self, exchange: Exchange) -> Outcome | Steps:
        """Judge or edit the answer, before its body."""
        return CONTINUE

    def on_end(self, exchange: Exchange) -> None:
        """Take note: the exchange is over."""

    def explain(self, exchange: Exchange) -> str:
        """One line for `explain`: what this filter would say to the request; "" when nothing."""
        return ""


@dataclass(frozen=True, slots=True)
class Chain:
    """The filters of one destination, in order, with only those hooks that do something."""

    filters: tuple[Filter, ...] = ()
    connect: tuple[Callable[[Connection], Outcome | Steps], ...] = ()
    request: tuple[Callable[[Exchange], Outcome | Steps], ...] = ()
    response: tuple[tuple[int, Callable[[Exchange], Outcome | Steps]], ...] = ()
    """Reversed, each with how many request hooks must have begun before it counts."""
    end: tuple[Callable[[Exchange], None], ...] = ()

    @classmethod
    def of(cls, filters: Iterable[Filter]) -> Chain:
        """Sort by phase (stable) and find out which hooks are overridden."""
        ordered = tuple(sorted(filters, key=lambda each: each.phase))
        response: list[tuple[int, Callable[[Exchange], Outcome | Steps]]] = []
        requests = 0
        for each in ordered:
            requests += _overrides(each, "on_request")
            if _overrides(each, "on_response"):
                response.append((requests, each.on_response))
        return cls(
            filters=ordered,
            connect=tuple(f.on_connect for f in ordered if _overrides(f, "on_connect")),
            request=tuple(f.on_request for f in ordered if _overrides(f, "on_request")),
            response=tuple(reversed(response)),
            end=tuple(f.on_end for f in ordered if _overrides(f, "on_end")),
        )


def _overrides(one: Filter, hook: str) -> bool:
    return getattr(type(one), hook) is not getattr(Filter, hook)
