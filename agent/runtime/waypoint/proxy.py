"""One request through the waypoint: filters, route, endpoint, and back.

    client's head -> filters -> rule -> endpoint -> its head -> filters -> client

`Proxy` holds what all requests share; `RequestRun` is one request in progress
(forward.py has its way to an endpoint).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import trio

from meshbpf.agent.core.authority import HostPort
from meshbpf.agent.core.workload import NamespacedHostname
from meshbpf.agent.l7.balancer import Balancer
from meshbpf.agent.l7.exchange import Connection, Exchange, Flag, Protocol
from meshbpf.agent.l7.filter import Call, Chain, Reply
from meshbpf.agent.l7.message import RequestHead
from meshbpf.agent.l7.plan import UNDECLARED, PortPlan, ServicePlan
from meshbpf.agent.l7.retry import RetryBudget
from meshbpf.agent.l7.rules import Backend
from meshbpf.agent.l7.telemetry.tcp_metrics import TcpMetrics
from meshbpf.agent.runtime.waypoint.calls import Calls
from meshbpf.agent.runtime.waypoint.forward import RequestRun
from meshbpf.agent.runtime.waypoint.limits import Limits
from meshbpf.agent.runtime.waypoint.message import ClientGoneError, ClientRequest
from meshbpf.agent.runtime.waypoint.pools import Pools
from meshbpf.agent.runtime.waypoint.run_filters import end
from meshbpf.agent.runtime.waypoint.state import LiveState

_GRPC = b"application/grpc"
_BUDGETS_LIMIT = 4096
_MIRROR_S = 15.0
NOT_BOUND = Reply(503, b"this service is no longer served by this waypoint\n", detail="not_bound")


@dataclass(slots=True)
class ProxyStatistics:
    """Totals since the start."""

    requests: int = 0
    retries: int = 0
    local_replies: int = 0
    client_gone: int = 0


class Proxy:
    """Everything that requests share."""

    def __init__(
        self,
        state: LiveState,
        pools: Pools,
        balancer: Balancer,
        calls: Calls,
        nursery: trio.Nursery,
        limits: Limits,
        rng: random.Random,
        tcp: TcpMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.state = state
        self.pools = pools
        self.balancer = balancer
        self.calls = calls
        self.nursery = nursery
        self.limits = limits
        self.rng = rng
        self.tcp = tcp
        self.clock = clock
        self.statistics = ProxyStatistics()
        self._budgets: dict[tuple[NamespacedHostname, int], RetryBudget] = {}

    async def handle(
        self, connection: Connection, request: ClientRequest, protocol: Protocol
    ) -> None:
        """Answer one request. Whatever becomes of it, its filters are told of its end."""
        self.statistics.requests += 1
        head = request.head
        if protocol is Protocol.HTTP2 and any(
            name == b"content-type" and value.startswith(_GRPC) for name, value in head.headers.raw
        ):
            protocol = Protocol.GRPC
        exchange = Exchange(connection, head, protocol, self.clock(), time.time())
        exchange.request_id = head.headers.get("x-request-id") or self._request_id(exchange)
        plan, chain, port = self._planned(connection)
        run = RequestRun(self, exchange, request, chain, port)
        try:
            if plan is None and connection.destination.service is not None:
                await run.answer(NOT_BOUND)
            else:
                await run.run()
        except ClientGoneError:
            request.gone = True
        finally:
            if request.gone:
                self.statistics.client_gone += 1
                exchange.flags.append(Flag.DOWNSTREAM_RESET)
            exchange.ended_s = self.clock()
            end(chain, exchange)

    async def send_copy(
        self, backend: Backend, head: RequestHead, body: bytes, http2: bool
    ) -> None:
        """A mirrored request: its answer is read and dropped, its failure is nobody's."""
        authority = HostPort(backend.service.hostname, backend.port)
        await self.calls(Call(authority, head, body, timeout_s=_MIRROR_S, http2=http2))

    def budget(self, service: NamespacedHostname, port: int) -> RetryBudget:
        """The retries of one backend."""
        budget = self._budgets.get((service, port))
        if budget is None:
            if len(self._budgets) >= _BUDGETS_LIMIT:
                self._budgets.clear()
            budget = self._budgets[service, port] = RetryBudget(self.clock())
        return budget

    def _planned(self, connection: Connection) -> tuple[ServicePlan | None, Chain, PortPlan]:
        plan, destination = self.state.plan, connection.destination
        if destination.service is None:
            return None, plan.pods, UNDECLARED
        found = plan.services.get(destination.service.key)
        if found is None:
            return None, Chain(), UNDECLARED
        return found, found.chain, found.ports.get(destination.port, UNDECLARED)

    def _request_id(self, exchange: Exchange) -> str:
        made = f"{self.rng.getrandbits(128):032x}"
        made = f"{made[:8]}-{made[8:12]}-4{made[13:16]}-{made[16:20]}-{made[20:]}"
        exchange.request.headers.add("x-request-id", made)
        return made
