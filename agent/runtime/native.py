"""The relay's innermost loop in C, where it was built: `_relay`, from the folder relay/.

It is an accelerator of what reactor.py, tunnel.py and stream.py do, on their
own objects: an event that it can deal with costs no Python at all, any other
comes back to the callbacks as if it had not been there. Without it nothing
changes but speed (docs/adr/0010-relay-in-c.md), so it is left out without a
word where it was not built, where pyOpenSSL is not made as we know it, or
where MESHBPF_PURE_PYTHON is set.
"""

from __future__ import annotations

import functools
import importlib
import os
import select
import socket
from typing import TYPE_CHECKING, Any

from meshbpf.agent.core.tuning import Keepalive
from meshbpf.agent.wire import records

if TYPE_CHECKING:
    from meshbpf.agent.runtime.stream import TunnelStream
    from meshbpf.agent.runtime.tunnel import Tunnel
    from meshbpf.agent.wire.windows import ReceiveWindow, SendWindow

try:
    _relay: Any = importlib.import_module("meshbpf.agent.runtime._relay")
except ImportError:  # no compiler when this was installed
    _relay = None

Engine = Any
Handle = Any


@functools.cache
def _usable(pure_python: str | None) -> bool:
    return _relay is not None and not pure_python and records.function_addresses() is not None


def available() -> bool:
    """Whether it was built, and may be used."""
    return _usable(os.environ.get("MESHBPF_PURE_PYTHON"))


def pod_socket(
    netns_fd: int,
    family: int,
    own_sockets_map: int,
    keepalive: Keepalive,
    client: bytes,
    mark: int,
) -> socket.socket:
    """A prepared socket in a pod's namespace, bound to the packed address `client` unless empty."""
    options = (
        keepalive.enabled,
        keepalive.time_s,
        keepalive.interval_s,
        keepalive.retries,
        keepalive.user_timeout_ms,
    )
    fd = _relay.pod_socket(netns_fd, int(family), own_sockets_map, options, client, mark)
    return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=fd)


def engine(epoll: select.epoll) -> Engine | None:
    """What waits on `epoll` in C; None where there is no such thing."""
    addresses = records.function_addresses()
    if addresses is None or not available():
        return None
    return _relay.Engine(epoll.fileno(), *addresses)


def tunnel_handle(tunnel: Tunnel, engine: Engine, sock: socket.socket) -> Handle | None:
    """The tunnel for the engine; None when its TLS is out of the engine's reach."""
    parts = tunnel.parts()
    if parts.tls is None:
        return None
    wire = parts.wire
    return _relay.TunnelHandle(
        engine, sock.fileno(), *parts.tls, tunnel, wire, wire.splitter, wire.send_window,
        wire.receive_window, wire.out, parts.turn, parts.backlog, parts.fast,
    )  # fmt: skip


def stream_handle(
    stream: TunnelStream,
    tunnel: Handle,
    app: socket.socket,
    windows: tuple[SendWindow, ReceiveWindow],
) -> Handle:
    """The stream for the engine."""
    return _relay.StreamHandle(
        tunnel, app.fileno(), stream.id, stream, *windows, stream.taken_from_app,
        stream.sent_to_app, stream.pending,
    )  # fmt: skip
