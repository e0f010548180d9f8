"""One process with all the servers that a pod of the testbed needs.

    python -m tests.progs.server [--only echo,greet] [--name NAME]

Every service has its own port (SERVICES) on a dual-stack socket and a thread a
connection, as plain as a server can be. What happens is told on standard
output, a JSON object a line: `ready`, `accepted`, `closed` (with the byte
count, and whether the peer ended with FIN or RST).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import cast

from tests.progs.stream import blocks

ECHO, GREET, EXCHANGE, SINK, FAREWELL, RESET, SLOW, SILENT, WHOAMI, DATAGRAM, EXEMPT = range(
    7001, 7012
)
CHUNK_BYTES = 256 * 1024

_output = threading.Lock()


def tell(event: str, **fields: object) -> None:
    """One line of JSON on standard output, whole even with many threads."""
    with _output:
        sys.stdout.write(json.dumps({"event": event, "at": time.time(), **fields}) + "\n")
        sys.stdout.flush()


def echo(conn: socket.socket) -> dict[str, object]:
    """Give back what comes, until the peer ends its side; then end ours."""
    count = 0
    while data := conn.recv(CHUNK_BYTES):
        conn.sendall(data)
        count += len(data)
    return {"bytes": count}


def greet(conn: socket.socket) -> dict[str, object]:
    """Speak first, as SMTP, MySQL and SSH do, then echo."""
    conn.sendall(f"220 {NAME} ready\r\n".encode())
    return echo(conn)


def exchange(conn: socket.socket) -> dict[str, object]:
    """Send and receive at the same time, then say what arrived.

    Request: `BYTES SEED\\n`, then the client's own stream until it ends its
    side. Answer: BYTES bytes of the stream SEED, then, after the client's end,
    one JSON line with the count and digest of what came.
    """
    # makefile() with a buffer gives a BufferedReader; its declared type is wider.
    reader = cast("io.BufferedReader", conn.makefile("rb", buffering=CHUNK_BYTES))
    size, seed = map(int, reader.readline().split())
    sender = threading.Thread(target=_send_stream, args=(conn, size, seed))
    sender.start()
    sha, count = hashlib.sha256(), 0
    while data := reader.read1(CHUNK_BYTES):
        sha.update(data)
        count += len(data)
    sender.join()
    report = {"bytes": count, "sha256": sha.hexdigest()}
    conn.sendall(json.dumps(report).encode() + b"\n")
    return report


def _send_stream(conn: socket.socket, size: int, seed: int) -> None:
    try:
        for piece in blocks(size, seed):
            conn.sendall(piece)
    except OSError as error:
        tell("send failed", error=str(error))


def sink(conn: socket.socket) -> dict[str, object]:
    """Take everything until the client's half-close, only then answer."""
    sha, count = hashlib.sha256(), 0
    while data := conn.recv(CHUNK_BYTES):
        sha.update(data)
        count += len(data)
    report = {"bytes": count, "sha256": sha.hexdigest()}
    conn.sendall(json.dumps(report).encode() + b"\n")
    return report


def farewell(conn: socket.socket) -> dict[str, object]:
    """Half-close first: say goodbye, end our side, and listen on until the peer ends."""
    conn.sendall(b"bye\n")
    conn.shutdown(socket.SHUT_WR)
    text = bytearray()
    while data := conn.recv(CHUNK_BYTES):
        text += data
    return {"bytes": len(text), "text": text.decode()}


def reset(conn: socket.socket) -> dict[str, object]:
    """Wait for a line, then end the connection with RST."""
    conn.recv(1024)
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return {}


def slow(conn: socket.socket) -> dict[str, object]:
    """Read 16 KiB every 20 ms: what the sender has beyond that must wait with the sender."""
    count = 0
    while data := conn.recv(16 * 1024):
        count += len(data)
        time.sleep(0.02)
    return {"bytes": count}


def silent(conn: socket.socket) -> dict[str, object]:
    """Accept and never say anything, until the peer leaves."""
    while conn.recv(CHUNK_BYTES):
        pass
    return {}


def whoami(conn: socket.socket) -> dict[str, object]:
    """Tell the client which addresses this side sees."""
    line = json.dumps({"server": NAME, "peer": _peer(conn)[0], "local": _plain(conn.getsockname())})
    conn.sendall(line.encode() + b"\n")
    conn.shutdown(socket.SHUT_WR)
    conn.recv(1)
    return {}


SERVICES: dict[str, tuple[int, Callable[[socket.socket], dict[str, object]]]] = {
    "echo": (ECHO, echo),
    "greet": (GREET, greet),
    "exchange": (EXCHANGE, exchange),
    "sink": (SINK, sink),
    "farewell": (FAREWELL, farewell),
    "reset": (RESET, reset),
    "slow": (SLOW, slow),
    "silent": (SILENT, silent),
    "whoami": (WHOAMI, whoami),
    # Echo on the port that the tests' agents are told to leave alone.
    "exempt": (EXEMPT, echo),
}
NAME = "server"


def _plain(address: tuple[str, int, int, int]) -> str:
    return address[0].removeprefix("::ffff:")


def _peer(conn: socket.socket) -> tuple[str, int]:
    address = conn.getpeername()
    return _plain(address), address[1]


def _serve_one(service: str, conn: socket.socket) -> None:
    serve = SERVICES[service][1]
    with conn:
        try:
            ip, port = _peer(conn)
        except OSError as error:
            tell("lost", service=service, error=str(error))
            return
        tell("accepted", service=service, peer=ip, port=port)
        how: dict[str, object]
        try:
            how = {"end": "fin", **serve(conn)}
        except (OSError, ValueError) as error:
            how = {"end": type(error).__name__, "error": str(error)}
    tell("closed", service=service, peer=ip, port=port, **how)


def _listen(service: str) -> socket.socket:
    port = SERVICES[service][0]
    listener = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    if service == "slow":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    listener.bind(("::", port))
    listener.listen(1024)
    return listener


def _accept(service: str, listener: socket.socket) -> None:
    while True:
        conn, _ = listener.accept()
        threading.Thread(target=_serve_one, args=(service, conn), daemon=True).start()


def _datagrams() -> None:
    """Echo UDP, which no capture may touch."""
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", DATAGRAM))
    while True:
        data, peer = sock.recvfrom(65535)
        sock.sendto(data, peer)


def main() -> None:
    global NAME
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", default="server")
    parser.add_argument("--only", help="comma-separated services; all of them by default")
    options = parser.parse_args()
    NAME = options.name
    threading.stack_size(256 * 1024)
    services = options.only.split(",") if options.only else list(SERVICES)
    listeners = {service: _listen(service) for service in services}
    if not options.only:
        threading.Thread(target=_datagrams, daemon=True).start()
    for service, listener in listeners.items():
        threading.Thread(target=_accept, args=(service, listener), daemon=True).start()
    tell("ready")
    threading.Event().wait()


if __name__ == "__main__":
    main()
