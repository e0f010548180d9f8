"""A gRPC server for tests, on h2 over a unix socket, that can misbehave.

Each call's handler is handed a `ServerCall` and does with it what it likes:
answer in pieces, ignore windows, reset, say goodbye, or fall silent. What is
not misbehaviour follows the protocol, so the client cannot tell it from a
real one; tests with grpcio's own server stand beside.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import trio

from meshbpf.agent.wire.grpc import encode

OK_HEADERS = [(":status", "200"), ("content-type", "application/grpc")]
OK_TRAILERS = [("grpc-status", "0")]


@dataclass(slots=True, eq=False)
class ServerCall:
    """One call as the server sees it."""

    server: Connection
    stream_id: int
    headers: dict[str, str]
    body: bytearray = field(default_factory=bytearray)
    changed: trio.Event = field(default_factory=trio.Event)
    complete: bool = False
    reset_code: int | None = None

    async def request(self) -> bytes:
        """The first message, once the client has half-closed."""
        while not self.complete:
            await self.wait()
        size = struct.unpack_from(">xL", self.body)[0]
        return bytes(self.body[5 : 5 + size])

    async def wait(self) -> None:
        self.changed = trio.Event()
        await self.changed.wait()

    async def start(self) -> None:
        self.server.h2.send_headers(self.stream_id, OK_HEADERS)
        await self.server.flush()

    async def send(self, message: bytes, *, piece: int = 16_384, raw: bool = False) -> None:
        """One message in DATA frames of `piece` bytes, as the client's windows allow."""
        data = message if raw else encode(message)
        while data:
            room = min(self.server.h2.local_flow_control_window(self.stream_id), piece)
            if room <= 0:
                await self.wait()
                continue
            self.server.h2.send_data(self.stream_id, data[:room])
            self.server.data_sent += min(room, len(data))
            data = data[room:]
            await self.server.flush()

    async def end(self, *trailers: tuple[str, str]) -> None:
        self.server.h2.send_headers(self.stream_id, trailers or OK_TRAILERS, end_stream=True)
        await self.server.flush()

    async def answer(self, message: bytes) -> None:
        await self.start()
        await self.send(message)
        await self.end()


Handler = Callable[[ServerCall], Awaitable[None]]


@dataclass(slots=True, eq=False)
class Connection:
    """One client's connection."""

    stream: trio.abc.Stream
    handlers: dict[str, Handler]
    settings: dict[int, int]
    calls: dict[int, ServerCall] = field(default_factory=dict)
    data_sent: int = 0
    lock: trio.Lock = field(default_factory=trio.Lock)
    h2: h2.connection.H2Connection = field(init=False)

    def __post_init__(self) -> None:
        self.h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=False, header_encoding="utf-8")
        )
        self.h2.local_settings = h2.settings.Settings(client=False, initial_values=self.settings)

    async def flush(self) -> None:
        async with self.lock:
            if data := self.h2.data_to_send():
                await self.stream.send_all(data)

    async def write(self, data: bytes) -> None:
        """Bytes that h2 knows nothing of."""
        async with self.lock:
            await self.stream.send_all(data)

    async def serve(self) -> None:
        self.h2.initiate_connection()
        await self.flush()
        async with trio.open_nursery() as nursery:
            try:
                while data := await self.stream.receive_some(65_536):
                    for event in self.h2.receive_data(bytes(data)):
                        self.handle(event, nursery)
                    await self.flush()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # a handler hung up, as its test wants
            nursery.cancel_scope.cancel()

    def handle(self, event: h2.events.Event, nursery: trio.Nursery) -> None:
        match event:
            case h2.events.RequestReceived():
                fields = dict(event.headers or ())
                call = ServerCall(self, event.stream_id or 0, fields)
                self.calls[call.stream_id] = call
                nursery.start_soon(self.run, fields[":path"], call)
            case h2.events.DataReceived():
                call = self.calls[event.stream_id or 0]
                call.body += event.data or b""
                call.changed.set()
                if not fields_ask_to_hold(call.headers):
                    self.h2.acknowledge_received_data(
                        event.flow_controlled_length or 0, call.stream_id
                    )
            case h2.events.StreamEnded():
                self.calls[event.stream_id or 0].complete = True
                self.calls[event.stream_id or 0].changed.set()
            case h2.events.StreamReset():
                call = self.calls[event.stream_id or 0]
                call.reset_code = int(event.error_code or 0)
                call.changed.set()
            case h2.events.WindowUpdated() | h2.events.RemoteSettingsChanged():
                for call in self.calls.values():
                    call.changed.set()

    async def run(self, path: str, call: ServerCall) -> None:
        try:
            await self.handlers[path.lstrip("/")](call)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return  # the client went away meanwhile
        except h2.exceptions.ProtocolError:
            if call.reset_code is None:
                raise
            # The client left the call while we wrote.


def fields_ask_to_hold(headers: dict[str, str]) -> bool:
    """A test's request for a server that does not top up its window."""
    return headers.get("x-hold") == "1"


@dataclass(slots=True)
class Server:
    """A listening server and the connections that it took."""

    path: Path
    connections: list[Connection] = field(default_factory=list)


@asynccontextmanager
async def serving(
    path: Path, handlers: dict[str, Handler], settings: dict[int, int] | None = None
) -> AsyncIterator[Server]:
    """Serve `handlers` (by "package.Service/Method") on a unix socket at `path`."""
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await sock.bind(str(path))
    sock.listen(8)
    server = Server(path)

    async def take(stream: trio.SocketStream) -> None:
        connection = Connection(stream, handlers, settings or {})
        server.connections.append(connection)
        try:
            await connection.serve()
        finally:
            await trio.aclose_forcefully(stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, take, [trio.SocketListener(sock)])
        yield server
        nursery.cancel_scope.cancel()
    await trio.Path(path).unlink()
