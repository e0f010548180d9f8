"""How to reach a control plane: gRPC over TLS, with a token that says who we are.

Roots and token are files that others renew (a projected volume); both are
read anew whenever they are needed, so that a rotation needs no restart.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.runtime.grpc_client import Channel, Keepalive, open_channel

# All of these as ztunnel's.
CONNECT_TIMEOUT_S = 5.0
PING = Keepalive(interval_s=30.0, timeout_s=10.0)
_TCP_KEEPALIVE = (
    (socket.TCP_KEEPIDLE, 300),
    (socket.TCP_KEEPINTVL, 75),
    (socket.TCP_KEEPCNT, 9),
)
SYSTEM_ROOTS = "SYSTEM"


class UnreachableError(MeshbpfError):
    """The control plane could not be connected to."""


@dataclass(frozen=True, slots=True)
class ControlPlane:
    """One address of a control plane, and what it takes to talk to it."""

    host: str
    port: int
    root: str
    """A PEM file, or SYSTEM for this machine's own roots."""
    name: str = ""
    """What its certificate must be for; by default the host."""
    token: Path | None = None
    cluster_id: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    """More of them, for each request."""

    @property
    def authority(self) -> str:
        """HOST:PORT."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    async def metadata(self) -> list[tuple[str, str]]:
        """The headers of a request. Raises UnreachableError when there is no token."""
        found = list(self.headers)
        if self.token is not None:
            try:
                token = (await trio.Path(self.token).read_text()).strip()
            except (OSError, UnicodeDecodeError) as error:
                raise UnreachableError(
                    "no-token",
                    f"the token for {self.authority} cannot be read from {self.token}: {error}",
                    "mount a projected service-account token there, or name its file "
                    "with --token-file",
                ) from error
            found += [("authorization", f"Bearer {token}"), ("clusterid", self.cluster_id)]
        return found

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[Channel]:
        """A connection for as long as the block lasts. Raises UnreachableError."""
        context = await trio.to_thread.run_sync(self._context)
        stream = await self._connect(context)
        async with open_channel(stream, self.authority, scheme="https", keepalive=PING) as channel:
            yield channel

    def _context(self) -> ssl.SSLContext:
        try:
            if self.root == SYSTEM_ROOTS:
                context = ssl.create_default_context()
            else:
                context = ssl.create_default_context(cafile=self.root)
        except (OSError, ssl.SSLError) as error:
            raise UnreachableError(
                "no-control-plane-roots",
                f"the roots to check {self.authority} by cannot be read from {self.root}: {error}",
                "in a cluster they are in the ConfigMap istio-ca-root-cert; "
                "see --xds-root and --ca-root",
            ) from error
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["h2"])
        return context

    async def _connect(self, context: ssl.SSLContext) -> trio.SSLStream[trio.SocketStream]:
        try:
            with trio.fail_after(CONNECT_TIMEOUT_S):
                transport = await trio.open_tcp_stream(self.host, self.port)
                transport.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, value in _TCP_KEEPALIVE:
                    transport.setsockopt(socket.IPPROTO_TCP, option, value)
                stream = trio.SSLStream(
                    transport,
                    context,
                    server_hostname=self.name or self.host,
                    https_compatible=True,
                )
                try:
                    await stream.do_handshake()
                except BaseException:
                    await trio.aclose_forcefully(stream)
                    raise
        except trio.TooSlowError:
            raise self._unreachable(f"no answer in {CONNECT_TIMEOUT_S:g} s") from None
        except (OSError, trio.BrokenResourceError) as error:
            raise self._unreachable(str(error.__cause__ or error)) from error
        return stream

    def _unreachable(self, why: str) -> UnreachableError:
        return UnreachableError(
            "control-plane-unreachable",
            f"cannot connect to the control plane at {self.authority}: {why}",
            "check that it runs and that its certificate is for "
            f"{self.name or self.host}, under the roots in {self.root}",
        )
