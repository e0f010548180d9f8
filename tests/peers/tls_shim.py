"""Plain TCP in, mutual TLS out: for programs that test HTTP/2 and hold no client certificate.

Listens on a port of the kernel's choosing on loopback of a network namespace,
and opens a TLS connection (TLS 1.3, ALPN h2) to the target for each one that
it accepts. Bytes go both ways until one side has ended. Each connection has one
thread: two must not use an SSL object at the same time, not even for two ways.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.peers.certs import Credentials
from tests.progs.inside import socket_inside

CHUNK_BYTES = 1 << 16


@contextlib.contextmanager
def tls_shim(
    netns: str, target: tuple[str, int], root: Path, credentials: Credentials
) -> Iterator[int]:
    """The port, for as long as the block runs."""
    context = ssl.create_default_context(cafile=str(root))
    context.check_hostname = False  # an HBONE server is known by its SPIFFE id
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(credentials.cert, credentials.key)
    listener = socket_inside(netns, socket.AF_INET)
    with listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        port: int = listener.getsockname()[1]

        def accept() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:  # the block has ended
                    return
                threading.Thread(target=carry, args=(client,), daemon=True).start()

        def carry(client: socket.socket) -> None:
            with client, contextlib.suppress(OSError):
                raw = socket_inside(netns, socket.AF_INET)
                raw.settimeout(10)
                raw.connect(target)
                with context.wrap_socket(raw) as server:
                    server.setblocking(False)
                    relay(client, server)

        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        try:
            yield port
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join()


def relay(client: socket.socket, server: ssl.SSLSocket) -> None:
    """Both directions, until one side has ended. What the server says goes before all else:
    it may say why it ends the connection in the midst of what it is sent.
    """
    unsent = b""
    while True:
        readable = [server] if unsent else [client, server]
        if server.pending():
            ready, writable = [server], []
        else:
            ready, writable, _ = select.select(readable, [server] if unsent else [], [])
        if server in ready:
            try:
                data = server.recv(CHUNK_BYTES)
            except ssl.SSLWantReadError:
                data = None  # no whole record, or one that is not for us
            if data == b"":
                return
            client.sendall(data or b"")
        if client in ready:
            unsent = client.recv(CHUNK_BYTES)
            if not unsent:
                return
        if unsent and (writable or client in ready):
            with contextlib.suppress(ssl.SSLWantWriteError):
                unsent = unsent[server.send(unsent) :]
