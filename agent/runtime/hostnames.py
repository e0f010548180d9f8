"""Addresses of workloads that the mesh knows by a hostname alone.

Asked of the node's own resolver, in the agent's network namespace, when a
connection needs one. An answer, also a negative one, is kept for a few
seconds: a busy client must not ask anew for each connection, and a name that
moved must not be missed for long.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable, Sequence

import trio

from meshbpf.agent.core.address import IPAddress, parse_ip

KEPT_S = 5.0
KEPT_NAMES = 1024
LIMIT_S = 5.0
"""As long as a client's resolver waits for one server (resolv.conf(5), timeout)."""

Resolve = Callable[[str], Awaitable[Sequence[IPAddress]]]

log = logging.getLogger(__name__)


class Hostnames:
    """Looks hostnames up, each of them once at a time."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, Sequence[IPAddress]]] = {}
        self._asking: dict[str, trio.Event] = {}

    async def addresses(self, hostname: str) -> Sequence[IPAddress]:
        """All addresses of `hostname`; none when it has none, or nobody answers."""
        while True:
            known = self._known.get(hostname)
            if known is not None and known[0] > trio.current_time():
                return known[1]
            asking = self._asking.get(hostname)
            if asking is None:
                return await self._ask(hostname)
            await asking.wait()

    async def _ask(self, hostname: str) -> Sequence[IPAddress]:
        self._asking[hostname] = trio.Event()
        try:
            found: Sequence[IPAddress] = ()
            with trio.move_on_after(LIMIT_S):
                found = await _look_up(hostname)
            if len(self._known) >= KEPT_NAMES:
                self._known.clear()
            self._known[hostname] = (trio.current_time() + KEPT_S, found)
            return found
        finally:
            self._asking.pop(hostname).set()


async def _look_up(hostname: str) -> Sequence[IPAddress]:
    try:
        found = await trio.socket.getaddrinfo(hostname, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        log.warning("hostname of a workload not found: %s: %s", hostname, error)
        return ()
    # In the resolver's order, each address once.
    return tuple(dict.fromkeys(parse_ip(str(sockaddr[0])) for *_, sockaddr in found))
