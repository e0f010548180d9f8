"""A DNS server in a pod, which remembers who asked it what; runs in threads of this process."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

import dns.flags
import dns.message
import dns.rcode
import dns.rrset

from tests.progs.inside import socket_inside

PORT = 53
ADDRESS, TEXT = "198.51.100.77", "x" * 200


class Resolver:
    """`outside.test` has an address, a text, and ten texts too long for UDP at `long.outside.test`.

    Names that end in `.silent` get no answer, everything else is NXDOMAIN.
    """

    def __init__(self, netns: str, *addresses: str) -> None:
        self.asked: list[tuple[str, str, str]] = []
        """Client address, name, type."""
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        for address in addresses:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            for kind, serve in ((socket.SOCK_DGRAM, self._udp), (socket.SOCK_STREAM, self._tcp)):
                sock = socket_inside(netns, family, kind)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind((address, PORT))
                if kind == socket.SOCK_STREAM:
                    sock.listen(16)
                self._sockets.append(sock)
                thread = threading.Thread(target=serve, args=(sock,), daemon=True)
                self._threads.append(thread)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for sock in self._sockets:
            sock.close()

    def names(self) -> list[str]:
        return [name for _, name, _ in self.asked]

    def _udp(self, sock: socket.socket) -> None:
        while True:
            try:
                data, sender = sock.recvfrom(4096)
            except OSError:
                return
            if not data:
                return  # shut down
            if answer := self._answer(data, sender[0], limit=512):
                sock.sendto(answer, sender)

    def _tcp(self, listener: socket.socket) -> None:
        while True:
            try:
                client, sender = listener.accept()
            except OSError:
                return
            with client, client.makefile("rb") as file:
                while len(size := file.read(2)) == 2:
                    data = file.read(int.from_bytes(size, "big"))
                    if answer := self._answer(data, sender[0], limit=65535):
                        client.sendall(len(answer).to_bytes(2, "big") + answer)

    def _answer(self, data: bytes, sender: str, limit: int) -> bytes:
        query = dns.message.from_wire(data)
        (question,) = query.question
        name = question.name.to_text(omit_final_dot=True).lower()
        self.asked.append((sender, name, question.rdtype.name))
        if name.endswith(".silent"):
            return b""
        answer = dns.message.make_response(query)
        texts = {"outside.test": [TEXT], "long.outside.test": [f"{n}{TEXT}" for n in range(10)]}
        if name == "outside.test" and question.rdtype.name == "A":
            answer.answer.append(dns.rrset.from_text(question.name, 60, "IN", "A", ADDRESS))
        elif name in texts and question.rdtype.name == "TXT":
            answer.answer.append(dns.rrset.from_text(question.name, 60, "IN", "TXT", *texts[name]))
        elif name not in texts:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        wire = answer.to_wire()
        if len(wire) > limit:
            answer.answer.clear()
            answer.flags |= dns.flags.TC
            wire = answer.to_wire()
        return wire
