"""The control socket: the agent's side of `agent/api.py`.

A unix socket, 0600, inside the 0700 state directory; and since modes can be
changed by mistake, each client's credentials are asked of the kernel
(SO_PEERCRED: who it was at connect time): root and the agent's own user are
served, everybody else is refused and logged.

Bounds: MAX_CLIENTS at once (the next one is told to come back), a request
of MAX_REQUEST_BYTES, CLIENT_IDLE_S between requests, REPLY_S to take an
answer. A verb that fails is answered and costs nobody else anything.
"""

from __future__ import annotations

import os
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import trio

from meshbpf.agent.api import (
    MAX_REQUEST_BYTES,
    ErrorBody,
    ReplyEnvelope,
    Request,
    RequestEnvelope,
    Result,
)
from meshbpf.agent.core.errors import Exit, MeshbpfError, PrivilegeError
from meshbpf.agent.runtime.logs import Log

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MAX_CLIENTS = 32
CLIENT_IDLE_S = 10.0
REPLY_S = 10.0

_READ_BYTES = 16 * 1024
_QUIET_POLL_S = 0.02
_PEERCRED = struct.Struct("3i")  # struct ucred: pid, uid, gid

R = TypeVar("R", bound=Result)
Handler = Callable[[Any], Awaitable[Result]]

log = Log("control")


class UsageError(MeshbpfError):
    """A request that no agent of this version understands."""

    exit_status = Exit.USAGE


@dataclass(frozen=True, slots=True)
class ControlStatistics:
    """Counters since the start."""

    requests: int
    failed: int
    forbidden: int
    turned_away: int


class ControlServer:
    """Answers requests with the handlers that were registered."""

    def __init__(
        self,
        path: Path,
        *,
        max_clients: int = MAX_CLIENTS,
        max_request_bytes: int = MAX_REQUEST_BYTES,
    ) -> None:
        self._path = path
        self._max_clients = max_clients
        self._max_request_bytes = max_request_bytes
        self._handlers: dict[str, tuple[type[Request[Any]], Handler]] = {}
        self._slots = trio.CapacityLimiter(max_clients)
        self.handed_over = False
        """A successor answers at our path: it is not ours to remove."""
        self._requests = self._failed = self._forbidden = self._turned_away = 0

    def handle(self, request: type[Request[R]], handler: Callable[[Any], Awaitable[R]]) -> None:
        """Answer `request` with `handler`, which may raise MeshbpfError."""
        self._handlers[request.VERB] = request, handler

    async def ask(self, request: Request[R]) -> R:
        """The answer to a request of this process itself. Raises what the handler raises."""
        _kind, handler = self._handlers[request.VERB]
        answer: R = await handler(request)  # type: ignore[assignment]
        return answer

    def move(self, path: Path) -> None:
        """A successor has the path: be asked at this one from the next `open` on."""
        self._path = path
        self.handed_over = False

    def open(self) -> socket.socket:
        """Bind the socket. A leftover of a dead agent is replaced: the state
        directory's lock, which the caller holds, says that it is dead.
        """
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            listener.bind(str(self._path))
            # Nobody can connect before listen(), so there is no moment of 0755.
            self._path.chmod(0o600)
            listener.listen(self._max_clients)
        except OSError as error:
            listener.close()
            raise MeshbpfError(
                "control-socket",
                f"control socket {self._path}: {error.strerror or error}",
                "a unix socket's path may have 107 bytes: give a shorter --state-dir",
            ) from error
        return listener

    async def serve(self, listener: socket.socket, clients: trio.Nursery | None = None) -> None:
        """Answer clients until cancelled; then close the socket, and unlink it if it is ours.

        Those who are being served then run in `clients`, or end too.
        """
        path = self._path
        try:
            with trio.socket.from_stdlib_socket(listener) as trio_listener:
                await trio.serve_listeners(
                    self._one_client,
                    [trio.SocketListener(trio_listener)],
                    handler_nursery=clients,
                )
        finally:
            if not self.handed_over:
                path.unlink(missing_ok=True)

    async def quiet(self) -> None:
        """Return when nobody is being served."""
        # Asked once in an agent's life, for a moment: no event is kept for it.
        while self._slots.borrowed_tokens:  # noqa: ASYNC110
            await trio.sleep(_QUIET_POLL_S)

    def statistics(self) -> ControlStatistics:
        """Counters since the start."""
        return ControlStatistics(self._requests, self._failed, self._forbidden, self._turned_away)

    async def _one_client(self, stream: trio.SocketStream) -> None:
        async with stream:
            try:
                self._admit(stream)
            except MeshbpfError as error:
                await _send(stream, refusal(error))
                return
            try:
                await self._serve_client(stream)
            finally:
                self._slots.release()

    def _admit(self, stream: trio.SocketStream) -> None:
        """Take a slot for the client, or raise what it is refused with."""
        credentials = stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
        assert isinstance(credentials, bytes)  # noqa: S101 (asked with a length)
        pid, uid, _gid = _PEERCRED.unpack(credentials)
        if uid not in (0, os.geteuid()):
            self._forbidden += 1
            log.warning("client refused: not root and not the agent's user", pid=pid, uid=uid)
            raise PrivilegeError(
                "forbidden",
                f"uid {uid} may not command this agent",
                "run the command as root, or as the user that the agent runs as",
            )
        try:
            self._slots.acquire_nowait()
        except trio.WouldBlock:
            self._turned_away += 1
            raise MeshbpfError(
                "busy", f"{self._max_clients} clients are being served", "try again in a moment"
            ) from None

    async def _serve_client(self, stream: trio.SocketStream) -> None:
        received = bytearray()
        while True:
            with trio.move_on_after(CLIENT_IDLE_S) as idle:
                try:
                    line = await _read_line(stream, received, self._max_request_bytes)
                except trio.BrokenResourceError:
                    return
                except UsageError as error:
                    await _send(stream, refusal(error))
                    return
            if idle.cancelled_caught or line is None:
                return
            if not await _send(stream, await self._answer(line)):
                return

    async def _answer(self, line: bytes) -> ReplyEnvelope:
        self._requests += 1
        try:
            handler, request = self._understand(line)
            result = await handler(request)
        except MeshbpfError as error:
            self._failed += 1
            return refusal(error)
        except Exception as error:  # noqa: BLE001
            # The boundary of one request: a fault of ours in one verb is
            # answered and logged with its traceback, the agent goes on.
            self._failed += 1
            log.error("request failed unexpectedly", cause=error)
            return ReplyEnvelope(
                ok=False,
                error=ErrorBody(
                    code="internal",
                    what=f"the agent failed at this: {type(error).__name__}: {error}",
                    hint="its log has the traceback",
                ),
            )
        return ReplyEnvelope(ok=True, result=msgspec.Raw(msgspec.json.encode(result)))

    def _understand(self, line: bytes) -> tuple[Handler, object]:
        try:
            envelope = msgspec.json.decode(line, type=RequestEnvelope)
            known = self._handlers.get(envelope.verb)
            if known is None:
                raise UsageError(
                    "unknown-verb",
                    f"the agent does not know {envelope.verb!r}",
                    f"it knows: {', '.join(sorted(self._handlers))}",
                )
            kind, handler = known
            return handler, msgspec.json.decode(envelope.args, type=kind)
        except msgspec.DecodeError as error:
            raise UsageError(
                "bad-request",
                f"the agent does not understand the request: {error}",
                "the client may be of another version: compare `meshbpf version`",
            ) from error


def refusal(error: MeshbpfError) -> ReplyEnvelope:
    """The error as an answer."""
    return ReplyEnvelope(ok=False, error=error_body(error))


def error_body(error: MeshbpfError) -> ErrorBody:
    """The error as the API spells it."""
    return ErrorBody(
        code=error.code, what=error.what, hint=error.hint, exit_status=int(error.exit_status)
    )


def counters(statistics: DataclassInstance) -> dict[str, int | float]:
    """The numbers of a statistics dataclass, by field; nested ones are left out."""
    found = {item.name: getattr(statistics, item.name) for item in fields(statistics)}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def summed(parts: Iterable[Mapping[str, int | float]]) -> dict[str, int | float]:
    """The parts' numbers added up, by name."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)


async def _read_line(
    stream: trio.SocketStream, received: bytearray, most_bytes: int
) -> bytes | None:
    """The next line without its end; None at the end of the stream."""
    searched = 0
    while (end := received.find(b"\n", searched)) < 0:
        if len(received) > most_bytes:
            raise UsageError("request-too-long", f"a request may have {most_bytes} bytes")
        searched = len(received)
        data = await stream.receive_some(_READ_BYTES)
        if not data:
            return None
        received += data
    line = bytes(received[:end])
    del received[: end + 1]
    return line


async def _send(stream: trio.SocketStream, reply: ReplyEnvelope) -> bool:
    """Whether the client took the answer in time."""
    with trio.move_on_after(REPLY_S) as scope:
        try:
            await stream.send_all(msgspec.json.encode(reply) + b"\n")
        except trio.BrokenResourceError:
            return False
    return not scope.cancelled_caught
