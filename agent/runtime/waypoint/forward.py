"""One request in progress: what its filters say, where it goes, what comes back.

Bodies stream in both directions at once; what one side does not take is not
read from the other. A body is kept only as long as it is short and nothing
has come back, for the sake of trying again.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, TypeVar

import trio

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.route import Refused
from meshbpf.agent.l7 import session as sessions
from meshbpf.agent.l7.balancer import Choice, pod_choice, session_of
from meshbpf.agent.l7.exchange import Exchange, Flag, Protocol
from meshbpf.agent.l7.filter import Chain, Outcome, Reply
from meshbpf.agent.l7.message import ResponseHead
from meshbpf.agent.l7.plan import PortPlan
from meshbpf.agent.l7.replies import reply_head
from meshbpf.agent.l7.retry import Failure, backoff_s, may_repeat
from meshbpf.agent.l7.router import Forward, choose, decide, finish
from meshbpf.agent.l7.rules import Backend, HttpRule, Shares
from meshbpf.agent.runtime.waypoint.body import BodySource
from meshbpf.agent.runtime.waypoint.channel import BrokenError
from meshbpf.agent.runtime.waypoint.message import (
    ClientGoneError,
    ClientRequest,
    FaultyPeerError,
    UnsentError,
    UpstreamRequest,
)
from meshbpf.agent.runtime.waypoint.opaque import join
from meshbpf.agent.runtime.waypoint.run_filters import run_hook

if TYPE_CHECKING:
    from meshbpf.agent.runtime.waypoint.proxy import Proxy

_GATEWAY_ERRORS = frozenset({502, 503, 504})  # what counts against an endpoint, as in Envoy
_SWITCHING = 101
_REPLIES = {
    Failure.UNSENT: (
        Flag.UPSTREAM_FAILURE,
        Reply(503, b"no connection to the endpoint\n", detail="upstream_connect_failure"),
    ),
    Failure.BROKEN: (
        Flag.UPSTREAM_RESET,
        Reply(503, b"the endpoint broke off\n", detail="upstream_reset_before_response_started"),
    ),
    Failure.BAD_ANSWER: (
        Flag.UPSTREAM_RESET,
        Reply(502, b"the endpoint's answer is no HTTP\n", detail="upstream_protocol_error"),
    ),
    Failure.TIMEOUT: (
        Flag.UPSTREAM_TIMEOUT,
        Reply(504, b"the endpoint did not answer in time\n", detail="upstream_per_try_timeout"),
    ),
}
_NO_ENDPOINT = Reply(503, b"no healthy upstream\n", detail="no_healthy_upstream")
_TOO_LATE = Reply(504, b"the request took too long\n", detail="response_timeout")

T = TypeVar("T")


class RequestRun:
    """See the module."""

    def __init__(
        self,
        proxy: Proxy,
        exchange: Exchange,
        request: ClientRequest,
        chain: Chain,
        port: PortPlan,
    ) -> None:
        self._proxy = proxy
        self._exchange = exchange
        self._request = request
        self._chain = chain
        self._port = port
        self._passed = 0
        """Request hooks that have begun."""
        self._answering = False
        self._origin = exchange.request.headers.get("origin")
        self._body = BodySource(self._read_client, has_body=request.has_body)

    async def run(self) -> None:
        """From the client's head to the end of the answer; cancelled when the client leaves."""
        reply = await self._filters()
        if reply is None:
            reply = await self._route()
        if reply is not None:
            await self.answer(reply)

    async def answer(self, reply: Reply) -> None:
        """Answer ourselves."""
        exchange = self._exchange
        self._proxy.statistics.local_replies += 1
        exchange.detail = reply.detail or exchange.detail
        for _ in range(2):
            head, body = reply_head(reply, exchange.protocol)
            exchange.response = head
            source = BodySource(self._nothing, has_body=False)
            source.kept = body
            changed = await self._response_filters(source)
            if changed is None:
                break
            reply = changed  # of a response filter; its own answer it may not change again
        body = source.kept
        if body:
            head.headers.set("content-length", str(len(body)))
        await self._start(head, has_body=bool(body))
        if body:
            exchange.response_bytes += len(body)
            await self._to_client(self._request.send_body(body))
            await self._to_client(self._request.end_body(None))

    # --- filters ----------------------------------------------------------------

    async def _filters(self) -> Reply | None:
        calls = self._proxy.calls
        for hook in self._chain.request:
            self._passed += 1
            outcome = await run_hook(hook, self._exchange, self._body, calls)
            if isinstance(outcome, Reply):
                return outcome
        return None

    async def _response_filters(self, body: BodySource) -> Reply | None:
        calls = self._proxy.calls
        for needs, hook in self._chain.response:
            if needs <= self._passed:
                outcome: Outcome = await run_hook(hook, self._exchange, body, calls)
                if isinstance(outcome, Reply):
                    return outcome
        return None

    # --- the way to an endpoint -------------------------------------------------

    async def _route(self) -> Reply | None:
        """Forward the request; what to answer when that is not to be, or not possible."""
        exchange, proxy = self._exchange, self._proxy
        if exchange.destination.service is None:
            return await self._forward(None)
        chosen = choose(self._port.routes_for(exchange.caller.namespace), exchange)
        if chosen is not None:
            for extension in chosen.rule.filters.extensions:
                outcome = await run_hook(extension.on_request, exchange, self._body, proxy.calls)
                if isinstance(outcome, Reply):
                    exchange.route = chosen.rule.name
                    return outcome
        decision = decide(chosen, exchange, proxy.rng)
        if isinstance(decision, Reply):
            return decision
        return await self._forward(decision)

    async def _forward(self, forward: Forward | None) -> Reply | None:
        timeout_s = 0.0 if forward is None else forward.rule.timeout_s
        body, request = self._body, self._request
        limit = self._proxy.limits.replay_bytes
        short = request.body_bytes is not None and request.body_bytes <= limit
        if not body.complete and (short or request.arrived):
            await body.gather(limit)
        if forward is not None and forward.mirrors:
            self._mirror(forward)
        if not timeout_s:
            return await self._streamed(forward)
        with trio.move_on_after(timeout_s):
            return await self._streamed(forward)
        self._exchange.flags.append(Flag.UPSTREAM_TIMEOUT)
        if self._answering:
            self._request.abort()
            return None
        return _TOO_LATE

    async def _streamed(self, forward: Forward | None) -> Reply | None:
        """The attempts; beside them, the client's body where it is not complete yet."""
        if self._body.complete:
            return await self._attempts(forward, None)
        reply: Reply | None = None
        async with trio.open_nursery() as nursery:
            reply = await self._attempts(forward, nursery)
            nursery.cancel_scope.cancel()
        return reply

    async def _attempts(
        self, forward: Forward | None, nursery: trio.Nursery | None
    ) -> Reply | None:
        exchange, proxy = self._exchange, self._proxy
        tried: list[str] = []
        rule = _DIRECT if forward is None else forward.rule
        budget = None
        if forward is not None:
            budget = proxy.budget(forward.backend.service, forward.backend.port)
            budget.earned()
        while True:
            choice = self._pick(forward, rule, tried)
            if isinstance(choice, Refused):
                exchange.flags.append(Flag.NO_HEALTHY_UPSTREAM)
                return _NO_ENDPOINT
            exchange.attempts += 1
            exchange.endpoint = choice.workload
            exchange.endpoint_address = choice.route.target
            exchange.endpoint_service = choice.service
            failure = await self._attempt(choice, forward, rule, nursery, fresh=bool(tried))
            if failure is None:
                return None
            again = (
                len(tried) < rule.retry.attempts
                and self._body.replayable
                and (isinstance(failure, int) or may_repeat(failure, exchange.request.method))
                and budget is not None
                and budget.take(proxy.clock())
            )
            if not again:
                if tried:
                    exchange.flags.append(Flag.RETRIES_EXHAUSTED)
                assert not isinstance(failure, int)  # noqa: S101 (a status is asked about first)
                flag, reply = _REPLIES[failure]
                exchange.flags.append(flag)
                return reply
            tried.append(choice.workload.uid)
            proxy.statistics.retries += 1
            if len(tried) > 1 or isinstance(failure, int):
                # At once to another endpoint; after that with patience.
                await trio.sleep(backoff_s(rule.retry.backoff_s, len(tried), proxy.rng.random()))

    async def _attempt(
        self,
        choice: Choice,
        forward: Forward | None,
        rule: HttpRule,
        nursery: trio.Nursery | None,
        *,
        fresh: bool,
    ) -> Failure | int | None:
        """One try: None when the client has its answer, else how it failed."""
        proxy = self._proxy
        proxy.balancer.began(choice)
        upstream: UpstreamRequest | None = None
        failure: Failure | int | None = None
        faulty = False
        """The answer itself counts against the endpoint."""
        try:
            try:
                if rule.try_timeout_s:
                    with trio.fail_after(rule.try_timeout_s):
                        upstream = await self._acquire(choice, forward, fresh=fresh)
                        head = await self._ask(upstream, nursery)
                else:
                    upstream = await self._acquire(choice, forward, fresh=fresh)
                    head = await self._ask(upstream, nursery)
            except trio.TooSlowError:
                failure = Failure.TIMEOUT
            except UnsentError:
                failure = Failure.UNSENT
            except BrokenError:
                failure = Failure.BROKEN
            except FaultyPeerError as error:
                failure = Failure.BAD_ANSWER
                if error.status < 500:
                    # Not the endpoint's fault: the request cannot be said to it.
                    failure = None
                    await self.answer(Reply(error.status, f"{error.what}\n".encode()))
                    return None
            if failure is not None or upstream is None:
                return failure
            if head.status in rule.retry.codes and self._may_retry_status(rule, forward):
                failure = head.status
                return failure
            faulty = head.status in _GATEWAY_ERRORS
            failure = await self._pass_on(upstream, head, choice, forward, rule)
        finally:
            if upstream is not None:
                upstream.release()
            failed = faulty or failure is not None
            proxy.balancer.ended(choice, proxy.clock(), failed=failed)
        return None

    def _may_retry_status(self, rule: HttpRule, forward: Forward | None) -> bool:
        return (
            forward is not None
            and self._exchange.attempts <= rule.retry.attempts
            and self._body.replayable
        )

    def _pick(self, forward: Forward | None, rule: HttpRule, tried: list[str]) -> Choice | Refused:
        proxy, exchange = self._proxy, self._exchange
        state = proxy.state
        if forward is None:
            return pod_choice(state.mesh, state.own, exchange.connection, proxy.rng)
        backend = forward.backend
        service = state.mesh.service(backend.service.namespace, backend.service.hostname)
        if service is None:
            return Refused(f"there is no service {backend.service}", "no-service")
        wanted = ""
        if rule.session is not None:
            headers = exchange.request.headers
            wanted = sessions.wanted(rule.session, headers, exchange.started_wall_s)
        return proxy.balancer.pick(
            state.mesh,
            state.own,
            service,
            backend.port,
            proxy.clock(),
            tried=tried,
            session=wanted,
        )

    async def _acquire(
        self, choice: Choice, forward: Forward | None, *, fresh: bool
    ) -> UpstreamRequest:
        try:
            return await self._proxy.pools.acquire(
                self._proxy.state.own, choice, http2=self._http2(forward), fresh=fresh
            )
        except (MeshbpfError, OSError) as error:
            self._exchange.detail = str(error)
            raise UnsentError("no-connection", str(error)) from error

    def _http2(self, forward: Forward | None) -> bool:
        protocol = self._exchange.protocol
        if protocol is Protocol.GRPC or forward is None:
            return protocol is not Protocol.HTTP1
        declared = self._proxy.state.plan.protocol(forward.backend.service, forward.backend.port)
        if declared in (None, Protocol.TCP):
            return protocol is Protocol.HTTP2
        return declared is Protocol.HTTP2

    async def _ask(self, upstream: UpstreamRequest, nursery: trio.Nursery | None) -> ResponseHead:
        body, request = self._body, self._request
        if body.replaced:
            self._exchange.request.headers.set("content-length", str(len(body.kept)))
        has_body = bool(body.kept) or not body.complete
        await upstream.send_head(self._exchange.request, has_body=has_body, upgrade=request.upgrade)
        if body.complete:
            if has_body:
                self._exchange.restart_request()
                self._exchange.count_request(body.kept)
                await upstream.send_body(body.kept)
                await upstream.end_body(request.trailers)
        else:
            assert nursery is not None  # noqa: S101 (there is one while the body is incomplete)
            nursery.start_soon(self._pump, upstream)
        return await upstream.read_head()

    async def _pump(self, upstream: UpstreamRequest) -> None:
        """The client's body, as it comes."""
        body = self._body
        try:
            while data := await body.next():
                self._exchange.count_request(data)
                await upstream.send_body(data)
            await upstream.end_body(self._request.trailers)
        except (BrokenError, FaultyPeerError):
            return  # whoever reads the answer finds out, or has one already
        except ClientGoneError:
            self._request.give_up()

    # --- the way back -----------------------------------------------------------

    async def _pass_on(
        self,
        upstream: UpstreamRequest,
        head: ResponseHead,
        choice: Choice,
        forward: Forward | None,
        rule: HttpRule,
    ) -> Failure | None:
        """Give the client the endpoint's answer; a Failure when that broke off."""
        exchange, request = self._exchange, self._request
        exchange.response = head
        exchange.first_byte_s = self._proxy.clock()
        exchange.detail = "via_upstream"
        if rule.session is not None:
            endpoint = session_of(choice.workload)
            asked = exchange.request.headers
            now_s = exchange.started_wall_s
            sessions.remember(rule.session, asked, head.headers, endpoint, now_s)
        if forward is not None:
            finish(rule, forward.backend, exchange, self._origin)
        body = BodySource(upstream.read_body, has_body=not upstream.empty)
        if self._chain.response:
            try:
                reply = await self._response_filters(body)
            except BrokenError:
                reply = _REPLIES[Failure.BROKEN][1]
            if reply is not None:
                await self.answer(reply)
                return None
        if head.status == _SWITCHING:
            await self._switch(upstream, head)
            return None
        if body.replaced:
            head.headers.set("content-length", str(len(body.kept)))
        has_body = bool(body.kept) or not body.complete
        head.trailers = None
        await self._start(head, has_body=has_body)
        if not has_body:
            return None
        try:
            while data := await body.next():
                exchange.count_response(data)
                await self._to_client(request.send_body(data))
        except (BrokenError, FaultyPeerError) as error:
            exchange.flags.append(Flag.UPSTREAM_RESET)
            exchange.detail = f"upstream_reset_after_response_started: {error.what}"
            request.abort()
            return Failure.BROKEN
        head.trailers = upstream.trailers
        await self._to_client(request.end_body(head.trailers))
        return None

    async def _switch(self, upstream: UpstreamRequest, head: ResponseHead) -> None:
        """Both ends speak something else from here on: a WebSocket, most likely."""
        self._answering = True
        client, from_client = await self._to_client(self._request.switch(head))
        endpoint, from_endpoint = upstream.switch()
        exchange = self._exchange

        def count(sent: int, received: int) -> None:
            exchange.request_bytes += sent
            exchange.response_bytes += received

        try:
            await join(client, endpoint, count, to_other=from_client, to_one=from_endpoint)
        except BrokenError as error:
            exchange.detail = error.what

    async def _start(self, head: ResponseHead, *, has_body: bool) -> None:
        self._answering = True
        await self._to_client(self._request.respond(head, has_body=has_body))

    # --- mirrors ------------------------------------------------------------------

    def _mirror(self, forward: Forward) -> None:
        """Send copies, whose answers nobody waits for. Only bodies that are kept can be copied."""
        if not self._body.complete:
            return
        for mirror in forward.mirrors:
            head = self._exchange.request.copy()
            self._proxy.nursery.start_soon(
                self._proxy.send_copy, mirror.backend, head, self._body.kept, self._http2(forward)
            )

    # --- the client ---------------------------------------------------------------

    async def _read_client(self) -> bytes:
        return await self._to_client(self._request.read_body())

    async def _nothing(self) -> bytes:
        return b""

    async def _to_client(self, work: Awaitable[T]) -> T:
        """What breaks here is the client's side, not the endpoint's."""
        try:
            return await work
        except BrokenError as error:
            raise ClientGoneError("client-gone", error.what) from error


_DIRECT = HttpRule("direct", Shares[Backend](()))
