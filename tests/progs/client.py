"""Clients as applications write them, one a verb; the result is one line of JSON.

    python -m tests.progs.client exchange ADDRESS PORT --bytes N [--edge]
    python -m tests.progs.client echo ADDRESS PORT [--mptcp | --mapped] [--mark N]
    python -m tests.progs.client many ADDRESS PORT --connections N [--at-once N]

Exit status 0 when every byte was right, 1 with `error` in the JSON otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import select
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tests.progs.stream import blocks, digest

IPPROTO_MPTCP = 262  # linux/in.h; in Python's socket module from 3.12 on
CHUNK_BYTES = 256 * 1024
CLIENT_SEED, SERVER_SEED = 11, 22


class WrongBytesError(Exception):
    """The bytes or the end of the connection were not as they should be."""


@dataclass(frozen=True, slots=True)
class Target:
    address: str
    port: int
    mptcp: bool = False
    mapped: bool = False
    mark: int = 0
    timeout_s: float = 15.0

    def connect(self) -> socket.socket:
        address = f"::ffff:{self.address}" if self.mapped else self.address
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM, IPPROTO_MPTCP if self.mptcp else 0)
        sock.settimeout(self.timeout_s)
        if self.mark:
            # As bytes: the option is unsigned, Python's integer argument is not.
            mark = self.mark.to_bytes(4, sys.byteorder)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        sock.connect((address, self.port))
        return sock


def expect_echo(sock: socket.socket, text: bytes) -> None:
    sock.sendall(text)
    got = bytearray()
    while len(got) < len(text):
        data = sock.recv(CHUNK_BYTES)
        if not data:
            raise WrongBytesError(f"the connection ended after {len(got)} of {len(text)} bytes")
        got += data
    if got != text:
        raise WrongBytesError("the echo differs from what was sent")


def echo(target: Target, text: bytes = b"marker-plaintext " * 64) -> dict[str, object]:
    """One round trip and an orderly end."""
    with target.connect() as sock:
        addresses: dict[str, object] = {
            "local": sock.getsockname()[0],
            "peer": sock.getpeername()[0],
        }
        expect_echo(sock, text)
        sock.shutdown(socket.SHUT_WR)
        if sock.recv(1):
            raise WrongBytesError("bytes after the end")
        return addresses


def many(target: Target, connections: int, at_once: int) -> dict[str, object]:
    """`connections` round trips, `at_once` connections open at any time.

    With all of them at once, none is closed before the last one was answered.
    """
    threading.stack_size(256 * 1024)
    everyone = threading.Barrier(at_once) if at_once == connections else None

    def one(number: int) -> None:
        with target.connect() as sock:
            text = f"connection {number} ".encode() * 20
            expect_echo(sock, text)
            if everyone is not None:
                everyone.wait(60)
                expect_echo(sock, text[::-1])
            sock.shutdown(socket.SHUT_WR)
            if sock.recv(1):
                raise WrongBytesError("bytes after the end")

    with ThreadPoolExecutor(at_once) as pool:
        for _ in pool.map(one, range(connections)):
            pass
    return {"connections": connections}


def exchange(target: Target, size: int, edge: bool) -> dict[str, object]:
    """Send `size` bytes and receive as many at the same time; check both digests."""
    with target.connect() as sock:
        sock.sendall(f"{size} {SERVER_SEED}\n".encode())
        began = time.monotonic()
        received, tail = _exchange_edge(sock, size) if edge else _exchange_plain(sock, size)
        seconds = time.monotonic() - began
    report = json.loads(tail)
    if report["bytes"] != size or report["sha256"] != digest(size, CLIENT_SEED):
        raise WrongBytesError(f"the server got {report['bytes']} bytes of {size}, or other ones")
    if received != digest(size, SERVER_SEED):
        raise WrongBytesError("the server's stream arrived damaged")
    return {"bytes_each_way": size, "seconds": round(seconds, 3)}


def _exchange_plain(sock: socket.socket, size: int) -> tuple[str, bytes]:
    failure: list[OSError] = []

    def send() -> None:
        try:
            for piece in blocks(size, CLIENT_SEED):
                sock.sendall(piece)
            sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            failure.append(error)

    sender = threading.Thread(target=send)
    sender.start()
    received = _Receiver(size)
    while data := sock.recv(CHUNK_BYTES):
        received.take(data)
    sender.join()
    if failure:
        raise failure[0]
    return received.finish()


def _exchange_edge(sock: socket.socket, size: int) -> tuple[str, bytes]:
    """The same with edge-triggered epoll: a lost wake-up shows as a stall."""
    sock.setblocking(False)
    received = _Receiver(size)
    pieces = blocks(size, CLIENT_SEED)
    pending = next(pieces, None)
    with select.epoll() as epoll:
        epoll.register(sock, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
        while True:
            ready = epoll.poll(15.0)
            if not ready:
                raise WrongBytesError(
                    f"no event in 15 s, {received.count} of {size} bytes received"
                )
            while pending is not None:
                try:
                    pending = pending[sock.send(pending) :] or next(pieces, None)
                except BlockingIOError:
                    break
                if pending is None:
                    sock.shutdown(socket.SHUT_WR)
            while True:
                try:
                    data = sock.recv(CHUNK_BYTES)
                except BlockingIOError:
                    break
                if not data:
                    return received.finish()
                received.take(data)


class _Receiver:
    """Hashes the first `size` bytes and keeps what follows, the server's report."""

    def __init__(self, size: int) -> None:
        self.size, self.count = size, 0
        self._sha, self._tail = hashlib.sha256(), b""

    def take(self, data: bytes) -> None:
        head = memoryview(data)[: max(0, self.size - self.count)]
        self._sha.update(head)
        self._tail += data[len(head) :]
        self.count += len(data)

    def finish(self) -> tuple[str, bytes]:
        if self.count < self.size:
            raise WrongBytesError(f"the connection ended after {self.count} of {self.size} bytes")
        return self._sha.hexdigest(), self._tail


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["echo", "many", "exchange"])
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("--bytes", type=int, default=1 << 20)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--at-once", type=int)
    parser.add_argument("--edge", action="store_true")
    parser.add_argument("--mptcp", action="store_true")
    parser.add_argument("--mapped", action="store_true")
    parser.add_argument("--mark", type=lambda text: int(text, 0), default=0)
    parser.add_argument("--timeout", type=float, default=15.0)
    options = parser.parse_args()
    target = Target(
        options.address, options.port, options.mptcp, options.mapped, options.mark, options.timeout
    )
    try:
        if options.verb == "echo":
            result = echo(target)
        elif options.verb == "many":
            result = many(target, options.connections, options.at_once or options.connections)
        else:
            result = exchange(target, options.bytes, options.edge)
    except (WrongBytesError, OSError, ValueError, threading.BrokenBarrierError) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
