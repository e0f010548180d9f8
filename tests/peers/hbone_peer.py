"""HBONE as a sidecar's own proxy speaks it, both ends, from the h2 library and `ssl` alone.

None of it is meshbpf's code. The form is Envoy's: a CONNECT with `:method` and
`:authority` and no other field, answered by a bare 200. A server here stands
for a sidecar (it dials the app on loopback) or for another network's gateway
(it dials the HBONE port of the pod that the authority names, and passes on
what is, to it, just bytes). One stream for each thread, kept simple: throughput
is not its business.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import h2.config
import h2.connection
import h2.events

from tests.peers.certs import Credentials
from tests.progs.inside import socket_inside
from tests.progs.program import BedError

CHUNK_BYTES = 1 << 14
LIMIT_S = 15.0

Dial = Callable[[str], socket.socket]
"""Given the authority, a connected socket to join the stream to."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One CONNECT that a server was sent."""

    authority: str
    headers: dict[str, str]


@dataclass(slots=True)
class Seen:
    """What came to a server, in order."""

    asked: list[Asked] = field(default_factory=list)
    connections: int = 0


def server_context(root: Path, own: Credentials) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(root)
    context.load_cert_chain(own.cert, own.key)
    context.set_alpn_protocols(["h2"])
    return context


def client_context(root: Path, own: Credentials) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(root))
    context.check_hostname = False  # its SPIFFE id is what matters, and not the test's business
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(own.cert, own.key)
    context.set_alpn_protocols(["h2"])
    return context


@contextlib.contextmanager
def hbone_server(
    netns: str, address: tuple[str, int], context: ssl.SSLContext, dial: Dial
) -> Iterator[Seen]:
    """Serve in that namespace for as long as the block runs."""
    seen = Seen()
    listener = socket_inside(netns, socket.AF_INET)
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(64)

        def accept() -> None:
            while True:
                try:
                    raw, _ = listener.accept()
                except OSError:  # the block has ended
                    return
                threading.Thread(target=serve, args=(raw,), daemon=True).start()

        def serve(raw: socket.socket) -> None:
            with raw, contextlib.suppress(OSError):
                raw.settimeout(LIMIT_S)
                with context.wrap_socket(raw, server_side=True) as tls:
                    tls.settimeout(None)
                    seen.connections += 1
                    _Serving(tls, seen, dial).run()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield seen
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


class _Serving:
    """One tunnel that came in. The lock guards the connection's state and the TLS socket."""

    def __init__(self, tls: ssl.SSLSocket, seen: Seen, dial: Dial) -> None:
        self._tls, self._seen, self._dial = tls, seen, dial
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        self._lock = threading.Condition()
        self._apps: dict[int, socket.socket] = {}

    def run(self) -> None:
        with self._lock:
            self._h2.initiate_connection()
            self._flush()
        try:
            while data := self._tls.recv(1 << 16):
                with self._lock:
                    events = self._h2.receive_data(data)
                    self._flush()
                    self._lock.notify_all()  # a window may have opened
                for event in events:
                    self._on(event)
        finally:
            for app in self._apps.values():
                app.close()

    def _on(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.RequestReceived():
                fields = {_text(name): _text(value) for name, value in event.headers}
                authority = fields[":authority"]
                self._seen.asked.append(Asked(authority, fields))
                try:
                    app = self._dial(authority)
                except OSError:
                    self._answer(event.stream_id, "503", end=True)
                    return
                self._apps[event.stream_id] = app
                self._answer(event.stream_id, "200", end=False)
                arguments = (event.stream_id, app)
                threading.Thread(target=self._back, args=arguments, daemon=True).start()
            case h2.events.DataReceived():
                with contextlib.suppress(OSError, KeyError):
                    self._apps[event.stream_id].sendall(event.data)
                with self._lock:
                    length = event.flow_controlled_length
                    self._h2.acknowledge_received_data(length, event.stream_id)
                    self._flush()
            case h2.events.StreamEnded():
                with contextlib.suppress(OSError, KeyError):
                    self._apps[event.stream_id].shutdown(socket.SHUT_WR)
            case h2.events.StreamReset():
                with contextlib.suppress(KeyError):
                    self._apps.pop(event.stream_id).close()

    def _answer(self, stream_id: int, status: str, *, end: bool) -> None:
        with self._lock:
            self._h2.send_headers(stream_id, [(":status", status)], end_stream=end)
            self._flush()

    def _back(self, stream_id: int, app: socket.socket) -> None:
        """App to tunnel, within the peer's window."""
        with contextlib.suppress(OSError, h2.exceptions.ProtocolError):
            while data := app.recv(CHUNK_BYTES):
                while data:
                    with self._lock:
                        window = self._h2.local_flow_control_window(stream_id)
                        if window <= 0:
                            self._lock.wait(LIMIT_S)
                            continue
                        size = min(window, self._h2.max_outbound_frame_size, len(data))
                        self._h2.send_data(stream_id, data[:size])
                        self._flush()
                    data = data[size:]
            with self._lock:
                self._h2.end_stream(stream_id)
                self._flush()

    def _flush(self) -> None:
        self._tls.sendall(self._h2.data_to_send())


def hbone_ask(
    netns: str,
    address: tuple[str, int],
    context: ssl.SSLContext,
    authority: str,
    send: bytes = b"",
    fields: dict[str, str] | None = None,
) -> tuple[int, bytes]:
    """One stream: the status, and with 200 what came back to `send` until its end."""
    raw = socket_inside(netns, socket.AF_INET)
    raw.settimeout(LIMIT_S)
    with raw:
        raw.connect(address)
        with context.wrap_socket(raw) as tls:
            connection = h2.connection.H2Connection()
            connection.initiate_connection()
            asked = [(":method", "CONNECT"), (":authority", authority), *(fields or {}).items()]
            connection.send_headers(1, asked)
            tls.sendall(connection.data_to_send())
            status, received = 0, bytearray()
            while data := tls.recv(1 << 16):
                for event in connection.receive_data(data):
                    match event:
                        case h2.events.ResponseReceived():
                            status = int(dict(event.headers)[b":status"])
                            if status == 200 and send:
                                connection.send_data(1, send)
                                connection.end_stream(1)
                        case h2.events.DataReceived():
                            received += event.data
                            connection.acknowledge_received_data(event.flow_controlled_length, 1)
                        case h2.events.StreamEnded() | h2.events.StreamReset():
                            return status, bytes(received)
                tls.sendall(connection.data_to_send())
    raise BedError(f"the tunnel ended; status {status}")


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
