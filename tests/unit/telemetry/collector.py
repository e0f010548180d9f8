"""An OpenTelemetry collector for tests: OTLP over HTTP, h11 on loopback, kept in memory."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import h11
import trio

from meshbpf.agent.wire.pb import otlp_pb2 as pb


@dataclass(slots=True, eq=False)
class FakeCollector:
    """What came in, and what is answered."""

    status: int = 200
    body: bytes = b""
    silent: bool = False
    """Takes the request, and never answers."""
    port: int = 0
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    """Path, headers and body."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def lines(self) -> list[pb.LogRecord]:
        """Of all that it took."""
        return [
            record
            for body in self._bodies("/v1/logs")
            for resource in pb.ExportLogsServiceRequest.FromString(body).resource_logs
            for scope in resource.scope_logs
            for record in scope.log_records
        ]

    def spans(self) -> list[pb.Span]:
        return [
            span
            for body in self._bodies("/v1/traces")
            for resource in pb.ExportTraceServiceRequest.FromString(body).resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def _bodies(self, path: str) -> Iterator[bytes]:
        return (body for at, _headers, body in self.requests if at.endswith(path))

    async def serve(self, stream: trio.abc.Stream) -> None:
        async with stream:
            try:
                await self._one(stream)
            except (trio.BrokenResourceError, h11.RemoteProtocolError):
                return  # the client went away, or does not trust us

    async def _one(self, stream: trio.abc.Stream) -> None:
        link = h11.Connection(h11.SERVER)
        head, body = None, b""
        while not isinstance(event := link.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                link.receive_data(bytes(await stream.receive_some(65536)))
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            else:
                return
        if self.silent:
            await trio.sleep_forever()
        assert head is not None
        assert head.method == b"POST"
        headers = {name.decode(): value.decode() for name, value in head.headers}
        self.requests.append((head.target.decode(), headers, body))
        fields = [("content-length", str(len(self.body)))]
        sent = link.send(h11.Response(status_code=self.status, headers=fields)) or b""
        sent += link.send(h11.Data(data=self.body)) or b""
        await stream.send_all(sent + (link.send(h11.EndOfMessage()) or b""))


@asynccontextmanager
async def collecting(tls: ssl.SSLContext | None = None) -> AsyncIterator[FakeCollector]:
    """One that listens on a port of its own."""
    collector = FakeCollector()
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    collector.port = listener.socket.getsockname()[1]
    ready = [listener if tls is None else trio.SSLListener(listener, tls, https_compatible=True)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, collector.serve, ready)
        yield collector
        nursery.cancel_scope.cancel()


@contextmanager
def collecting_in_thread(sock: socket.socket) -> Iterator[FakeCollector]:
    """One on a listening socket, of whatever network namespace, for tests without trio."""
    collector = FakeCollector(port=sock.getsockname()[1])
    ready = threading.Event()
    scope = trio.CancelScope()
    token: list[trio.lowlevel.TrioToken] = []

    async def main() -> None:
        token.append(trio.lowlevel.current_trio_token())
        sock.setblocking(False)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        with scope:
            ready.set()
            await trio.serve_listeners(collector.serve, [listener])

    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    ready.wait()
    try:
        yield collector
    finally:
        token[0].run_sync_soon(scope.cancel)
        thread.join()


def attributes(item: pb.LogRecord | pb.Span) -> dict[str, str | int]:
    """By name."""
    return {
        pair.key: getattr(pair.value, pair.value.WhichOneof("value") or "string_value")
        for pair in item.attributes
    }
