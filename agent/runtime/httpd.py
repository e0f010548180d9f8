"""A small HTTP/1.1 server for the agent's own ports: readiness, metrics, admin.

One request a connection, answered and closed; h11 does the protocol. Clients
are few and short: `max_clients` at once (more are closed unanswered), a bounded
head, a bounded body that is read and dropped, and `client_s` for the request
and again for taking the answer. How long the answer takes to make is the
handler's business.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import parse_qsl

import h11
import trio

from meshbpf.agent.core.address import SocketAddress
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.runtime.logs import Log

MAX_CLIENTS = 64
CLIENT_S = 5.0
MAX_HEAD_BYTES = 8 * 1024
MAX_BODY_BYTES = 64 * 1024
_MAX_QUERY_FIELDS = 32
_LINGER_S = 1.0

PLAIN = "text/plain; charset=utf-8"

log = Log("http")


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks, without its body."""

    method: str
    path: str
    query: Mapping[str, str]
    """The last value of each name."""
    headers: Mapping[str, str]
    """By lower-case name; of a repeated one all values, with commas between."""
    peer: SocketAddress
    local: SocketAddress


@dataclass(frozen=True, slots=True)
class Response:
    """What it gets; `body` may be text."""

    status: HTTPStatus
    body: bytes | str = b""
    content_type: str = PLAIN
    headers: Mapping[str, str] = field(default_factory=dict)


Handler = Callable[[Request], Awaitable[Response]]


class BadRequestError(MeshbpfError):
    """A request that is HTTP, but not one that we read."""


def open_listener(port: int, what: str, *, address: str | None = None) -> socket.socket:
    """A listening socket: on `address`, or for all addresses of both families.

    Where IPv6 is off, the latter is IPv4's alone. Raises MeshbpfError
    (port-in-use, no-ip) in which `what` names the port.
    """
    if address is None:
        choices = [(socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")]
    else:
        choices = [(socket.AF_INET6 if ":" in address else socket.AF_INET, address)]
    for family, bound in choices:
        try:
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            if error.errno != errno.EAFNOSUPPORT:
                raise
            continue
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address is not None))
            sock.bind((bound, port))
            sock.listen(MAX_CLIENTS)
        except OSError as error:
            sock.close()
            if error.errno == errno.EADDRNOTAVAIL:
                continue  # disable_ipv6, or no loopback address
            if error.errno == errno.EADDRINUSE:
                raise MeshbpfError(
                    "port-in-use",
                    f"{what} port {port} is taken in the agent's network namespace",
                    f"`ss -ltnp sport = :{port}` says by whom; one agent runs per namespace",
                ) from error
            raise
        else:
            return sock
    raise MeshbpfError("no-ip", f"{what} port: no address of this network namespace can be used")


def open_loopback(port: int, what: str) -> list[socket.socket]:
    """Listeners on 127.0.0.1 and ::1, as far as both exist. Raises as `open_listener`."""
    found: list[socket.socket] = []
    try:
        for address in ("127.0.0.1", "::1"):
            try:
                found.append(open_listener(port, what, address=address))
            except MeshbpfError as error:
                if error.code != "no-ip":
                    raise
            if port == 0 and found:
                port = found[0].getsockname()[1]
    except BaseException:
        for sock in found:
            sock.close()
        raise
    if not found:
        raise MeshbpfError("no-ip", f"{what} port: this network namespace has no loopback address")
    return found


async def serve(
    listeners: Sequence[socket.socket],
    handler: Handler,
    clients: trio.Nursery | None = None,
    *,
    max_clients: int = MAX_CLIENTS,
    client_s: float = CLIENT_S,
) -> None:
    """Answer until cancelled; closes the listeners.

    Those who are being answered then run in `clients`, or end too.
    """
    slots = trio.CapacityLimiter(max_clients)

    async def one(stream: trio.SocketStream) -> None:
        async with stream:
            try:
                slots.acquire_nowait()
            except trio.WouldBlock:
                return
            # The slot is borrowed by this task and given back by it.
            try:
                await _exchange(stream, handler, client_s)
            except (trio.BrokenResourceError, h11.ProtocolError, OSError):
                return  # the client went away or does not speak HTTP
            finally:
                slots.release()

    streams = [trio.SocketListener(trio.socket.from_stdlib_socket(one)) for one in listeners]
    await trio.serve_listeners(one, streams, handler_nursery=clients)


async def _exchange(stream: trio.SocketStream, handler: Handler, client_s: float) -> None:
    http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
    head: h11.Request | None = None
    with trio.move_on_after(client_s):
        head = await _read(stream, http)
    if head is None:
        return
    answer = await _answer(stream, handler, head)
    body = answer.body.encode() if isinstance(answer.body, str) else answer.body
    headers = [
        ("content-type", answer.content_type),
        ("content-length", str(len(body))),
        ("connection", "close"),
        *answer.headers.items(),
    ]
    told = h11.Response(
        status_code=answer.status.value, headers=headers, reason=answer.status.phrase.encode()
    )
    sent = http.send(told) or b""
    if head.method != b"HEAD":  # h11 lets its body through only when it is empty
        sent += http.send(h11.Data(data=body)) or b""
    with trio.move_on_after(client_s):
        await stream.send_all(sent)
        await stream.send_eof()
        # Read what is left, or the close becomes a reset that eats the answer.
        with trio.move_on_after(_LINGER_S):
            while await stream.receive_some(MAX_HEAD_BYTES):
                pass


async def _read(stream: trio.SocketStream, http: h11.Connection) -> h11.Request | None:
    """The request, once its body is over; None when the client left or sends too much."""
    head: h11.Request | None = None
    size = 0
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            if http.they_are_waiting_for_100_continue:
                told = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
                await stream.send_all(http.send(told) or b"")
            http.receive_data(await stream.receive_some(MAX_HEAD_BYTES))
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            size += len(event.data)
            if size > MAX_BODY_BYTES:
                return None
        else:
            return head


async def _answer(stream: trio.SocketStream, handler: Handler, head: h11.Request) -> Response:
    try:
        return await handler(_request(stream, head))
    except BadRequestError as error:
        return Response(HTTPStatus.BAD_REQUEST, f"{error.what}\n")
    except MeshbpfError as error:
        return Response(HTTPStatus.INTERNAL_SERVER_ERROR, f"{error.code}: {error.what}\n")
    except Exception as error:  # noqa: BLE001
        # The boundary of one request: a fault of ours in one handler is
        # answered and logged with its traceback, the agent goes on.
        log.error("request failed unexpectedly", cause=error)
        return Response(HTTPStatus.INTERNAL_SERVER_ERROR, "the agent failed at this: see its log\n")


def _request(stream: trio.SocketStream, head: h11.Request) -> Request:
    target = head.target.decode("ascii", "replace")
    path, _, query = target.partition("?")
    try:
        fields = parse_qsl(query, keep_blank_values=True, max_num_fields=_MAX_QUERY_FIELDS)
    except ValueError as error:
        raise BadRequestError("bad-query", str(error)) from error
    headers: dict[str, str] = {}
    for name, value in head.headers:
        key, text = name.decode("ascii"), value.decode("latin-1")
        headers[key] = f"{headers[key]},{text}" if key in headers else text
    return Request(
        method=head.method.decode("ascii"),
        path=path,
        query=dict(fields),
        headers=headers,
        peer=SocketAddress.from_sockaddr(stream.socket.getpeername()),
        local=SocketAddress.from_sockaddr(stream.socket.getsockname()),
    )
