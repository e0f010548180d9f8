"""The sockets at which the agent itself is asked: control, CNI, readiness, metrics, admin.

Opened before anything else, so that a port that is taken is found before a
pod is touched; or inherited from a predecessor that still answers at them.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import trio

from meshbpf.agent.config import Settings
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.handover import Inheritance
from meshbpf.agent.runtime import httpd, readiness
from meshbpf.agent.runtime.admin import Admin
from meshbpf.agent.runtime.control import ControlServer
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.runtime.monitoring import Monitoring
from meshbpf.agent.runtime.readiness import Readiness

log = Log("app")


class Fronts:
    """Made by `open`; `serve` answers until `stop`."""

    def __init__(self, settings: Settings, controls: Mapping[str, ControlServer]) -> None:
        self._settings = settings
        self._controls = controls
        """By the name under which their socket is handed over."""
        self._sockets: dict[str, list[socket.socket]] = {}
        self._accepting = trio.CancelScope()

    def open(self, stack: ExitStack, inheritance: Inheritance | None) -> None:
        """Open or inherit every socket; `stack` closes them. Raises MeshbpfError."""
        settings = self._settings
        kept = {name: _inherited(inheritance, name) for name in (*_PORTS, *self._controls)}

        def opened(name: str, port: int) -> list[socket.socket]:
            """The inherited ones, if they have the port that is wanted now."""
            found = kept.pop(name)
            if found and port == found[0].getsockname()[1]:
                return found
            for sock in found:
                sock.close()
            if not port:
                return []
            if name == "admin":
                return _admin(port)
            return [httpd.open_listener(port, name)]

        for name, port in (
            ("readiness", settings.readiness_port),
            ("stats", settings.stats_port),
            ("admin", settings.admin_port),
        ):
            self._sockets[name] = opened(name, port)
            for sock in self._sockets[name]:
                stack.callback(sock.close)
        for name, control in self._controls.items():
            self._sockets[name] = kept[name] or [control.open()]
            stack.callback(self._sockets[name][0].close)

    def descriptors(self) -> Iterator[tuple[str, int]]:
        """For a successor."""
        for name, sockets in self._sockets.items():
            for sock in sockets:
                yield name, sock.fileno()

    async def serve(self, ready: Readiness, monitoring: Monitoring, handlers: trio.Nursery) -> None:
        """Answer until `stop`, or cancelled; requests that are being answered run in `handlers`."""
        sockets = self._sockets
        admin = Admin(monitoring.admin_sources(), open_to_all=self._settings.admin_open)
        with self._accepting:
            async with trio.open_nursery() as nursery:
                for name, control in self._controls.items():
                    nursery.start_soon(control.serve, sockets[name][0], handlers)
                nursery.start_soon(readiness.serve, sockets["readiness"][0], ready, handlers)
                for name, handle in (("stats", monitoring.serve_metrics), ("admin", admin.handle)):
                    if sockets[name]:
                        nursery.start_soon(httpd.serve, sockets[name], handle, handlers)

    def hand_over(self) -> None:
        """Take no more requests: a successor does, at the same sockets."""
        for control in self._controls.values():
            control.handed_over = True
        self._accepting.cancel()


_PORTS = ("readiness", "stats", "admin")


def _inherited(inheritance: Inheritance | None, name: str) -> list[socket.socket]:
    if inheritance is None:
        return []
    sockets = [socket.socket(fileno=fd) for fd in inheritance.take(name)]
    for sock in sockets:
        sock.setblocking(False)
    return sockets


def _admin(port: int) -> list[socket.socket]:
    try:
        return httpd.open_loopback(port, "admin")
    except MeshbpfError as error:
        if error.code != "no-ip":
            raise
        # A netns whose lo is down: worth a word, no reason to carry nothing.
        log.warning("no admin port", cause=error.what)
        return []
