"""Short conversations over sockets of the pods, with the outcome as the result."""

from __future__ import annotations

import json
import socket
import struct
import time

from tests.progs.inside import socket_inside
from tests.progs.pod import Pod
from tests.progs.program import BedError
from tests.progs.server import DATAGRAM, ECHO, WHOAMI
from tests.testbed import Testbed

MARKER = b"marker-plaintext "
REFUSED_WITHIN_S = 1.0


def in_kernel(bed: Testbed) -> bool:
    """Whether the testbed's agents leave to the kernel what they may."""
    return "tc" not in bed.agents[1].options


def echo(sock: socket.socket, text: bytes = MARKER) -> None:
    """Send, and get the same back."""
    sock.sendall(text)
    got = receive(sock, len(text))
    assert got == text


def receive(sock: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes; BedError when the connection ends before."""
    got = bytearray()
    while len(got) < size:
        data = sock.recv(size - len(got))
        if not data:
            raise BedError(f"the connection ended after {len(got)} of {size} bytes")
        got += data
    return bytes(got)


def receive_all(sock: socket.socket) -> bytes:
    """Everything until the peer's FIN."""
    got = bytearray()
    while data := sock.recv(65536):
        got += data
    return bytes(got)


def passes(bed: Testbed, where: Pod | int, address: str, port: int = ECHO) -> None:
    """A new connection works, up to its orderly end."""
    with bed.connect(where, address, port) as sock:
        echo(sock)
        sock.shutdown(socket.SHUT_WR)
        assert receive_all(sock) == b""


def datagram_passes(where: Pod, address: str) -> None:
    """UDP goes there and back."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket_inside(where.netns, family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(2.0)
        sock.sendto(MARKER, (address, DATAGRAM))
        assert sock.recv(1024) == MARKER


def refused(
    bed: Testbed,
    where: Pod | int,
    address: str,
    port: int = ECHO,
    within_s: float = REFUSED_WITHIN_S,
) -> None:
    """A new connection ends with ECONNREFUSED, or RST, and does so in time."""
    began = time.monotonic()
    with bed.make_socket(where, 6 if ":" in address else 4) as sock:
        sock.settimeout(within_s + 2.0)
        try:
            sock.connect((address, port))
            # The kernel may complete the handshake for an agent that then says no.
            sock.sendall(MARKER)
            answer = sock.recv(65536)
        except (ConnectionRefusedError, ConnectionResetError, BrokenPipeError):
            took = time.monotonic() - began
            assert took < within_s, f"refused, but only after {took:.2f} s"
            return
        except TimeoutError:
            raise AssertionError(f"neither refused nor answered in {within_s + 2} s") from None
        raise AssertionError(f"not refused: {answer!r}")


def whoami(bed: Testbed, where: Pod | int, address: str) -> dict[str, str]:
    """Which addresses the server at `address` sees."""
    with bed.connect(where, address, WHOAMI) as sock:
        answer: dict[str, str] = json.loads(receive_all(sock))
    return answer


def ends(sock: socket.socket, within_s: float) -> str:
    """How the connection ends, "fin" or "reset"; BedError when it does not in time."""
    deadline = time.monotonic() + within_s
    while (left := deadline - time.monotonic()) > 0:
        sock.settimeout(left)
        try:
            if not sock.recv(65536):
                return "fin"
        except (ConnectionResetError, ConnectionAbortedError):
            return "reset"  # the latter where the kernel was told to end this very socket
        except TimeoutError:
            break
    raise BedError(f"the connection lives on after {within_s} s")


def close_with_reset(sock: socket.socket) -> None:
    """Close so that the peer sees RST instead of FIN."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
