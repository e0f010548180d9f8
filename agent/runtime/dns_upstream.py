"""Ask a pod's resolver on its behalf: query and answer pass as they are.

One socket a query: its port is the kernel's to choose, so that an answer
cannot be guessed, and what comes late finds nobody.
"""

from __future__ import annotations

import trio

from meshbpf.agent.core.address import SocketAddress
from meshbpf.agent.runtime.sockets import DialError, SocketFactory, connect, family_of
from meshbpf.agent.wire import dns

LIMIT_S = 5.0
"""As resolv.conf's default timeout: the client has given up by then."""


async def ask_by_udp(sockets: SocketFactory, resolver: SocketAddress, query: bytes) -> bytes:
    """The first datagram that answers this query. Raises DialError or OSError."""
    with sockets.datagram(family_of(resolver.ip)) as sock:
        # Not through trio's resolver: the address is one already.
        sock.connect((str(resolver.ip), resolver.port))
        sock.send(query)
        with trio.move_on_after(LIMIT_S):
            while True:
                await trio.lowlevel.wait_readable(sock)
                try:
                    answer = sock.recv(dns.MAX_MESSAGE_BYTES)
                except BlockingIOError:
                    continue
                if dns.is_answer_to(query, answer):
                    return answer
    raise _silent(resolver)


async def ask_by_tcp(sockets: SocketFactory, resolver: SocketAddress, query: bytes) -> bytes:
    """The answer on a connection of its own. Raises DialError or OSError."""
    with sockets.outbound(family_of(resolver.ip)) as sock:
        with trio.move_on_after(LIMIT_S):
            await connect(sock, resolver)
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
            try:
                await stream.send_all(dns.framed(query))
                buffer = bytearray()
                while True:
                    data = await stream.receive_some()
                    if not data:
                        raise DialError("resolver-closed", f"{resolver} closed without an answer")
                    buffer += data
                    for answer in dns.split_stream(buffer):
                        if dns.is_answer_to(query, answer):
                            return answer
            except trio.BrokenResourceError as error:
                raise DialError("resolver-closed", f"{resolver} reset the connection") from error
    raise _silent(resolver)


def _silent(resolver: SocketAddress) -> DialError:
    return DialError(
        "resolver-silent",
        f"the resolver {resolver} did not answer within {LIMIT_S:g} s",
        "the pod's resolv.conf names it: can the pod reach it?",
    )
