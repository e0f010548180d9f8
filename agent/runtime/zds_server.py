"""The agent's end of ZDS: hands pods to a proxy that runs beside it.

Each connection is told whatever differs between what ought to be served and
what it has been told, one request at a time, until nothing differs; then the
snapshot is complete, and from there on every change wakes it. So a proxy that
comes back, one that refused, and a pod that changed are all the same case.

Of several connections (a proxy that is being replaced, and the new one) the
newest is told; the others drain, and the next newest takes over should it end.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import trio

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.datapath.netns import Netns
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.wire import zds

ANSWER_S = 10.0
"""A proxy that has not answered by then is given up: it will connect again."""
RETRY_S = 5.0
"""After a refusal; as ztunnel's own for a pod that it could not start."""
_BACKLOG = 8
_UCRED = struct.Struct("3i")

log = Log("zds")


@dataclass(frozen=True, slots=True)
class Entry:
    """A pod that is to be served, with a descriptor of its namespace that is the entry's own."""

    key: str
    add: zds.Add
    netns: Netns


Started = Callable[[Entry, int], Awaitable[None]]
"""Called when process `pid` says that it serves the pod; raises MeshbpfError to ask it again."""


@dataclass(slots=True, eq=False)
class _Peer:
    """One connected proxy."""

    sock: trio.socket.SocketType
    pid: int
    told: dict[str, Entry] = field(default_factory=dict)
    failed: dict[str, float] = field(default_factory=dict)
    """Pods that it did not start, with the time from which on it is asked again."""
    ended: str = ""
    """Why there is nothing more to say to it."""


class ZdsServer:
    """Serves one socket. Entries may come and go before, during and after `run`."""

    def __init__(self, path: Path, started: Started, *, retry_s: float = RETRY_S) -> None:
        self._retry_s = retry_s
        self.path = path
        self._started = started
        self._wanted: dict[str, Entry] = {}
        self._peers: list[_Peer] = []
        self._changed = trio.Event()
        self._served_changed = trio.Event()
        self._served: dict[str, str] = {}
        """By the newest proxy: uid of each pod, by its key."""
        self._scope = trio.CancelScope()

    # --- what is to be served -----------------------------------------------

    def put(self, key: str, add: zds.Add, netns: Netns) -> None:
        """Have this pod served; one of the same name that differs is taken back first."""
        known = self._wanted.get(key)
        if known is not None:
            if known.add == add and known.netns.cookie == netns.cookie:
                return
            self.remove(key)
        self._wanted[key] = Entry(key, add, replace(netns, fd=os.dup(netns.fd)))
        self._wake()

    def remove(self, key: str) -> None:
        """Have it served no more. No error when it is not."""
        entry = self._wanted.pop(key, None)
        if entry is not None:
            entry.netns.close()
            self._served.pop(key, None)
            self._wake()

    async def until_served(self, key: str, limit_s: float) -> bool:
        """Wait until a proxy serves the pod; False at once when none is connected."""
        with trio.move_on_after(limit_s):
            while key not in self._served and self._peers:
                await self._served_changed.wait()
        return key in self._served

    @property
    def pid(self) -> int:
        """The newest proxy's process; 0 while there is none."""
        return self._peers[-1].pid if self._peers else 0

    def pids(self) -> frozenset[int]:
        """Of all that are connected."""
        return frozenset(peer.pid for peer in self._peers)

    def unserved(self) -> list[str]:
        """Names of the pods that no connected proxy serves."""
        return sorted(self._wanted.keys() - self._served.keys())

    # --- the socket ---------------------------------------------------------

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen until cancelled or closed. Raises MeshbpfError when the socket cannot be had."""
        with _listening(self.path) as listener, self._scope:
            task_status.started()
            async with trio.open_nursery() as nursery:
                while True:
                    sock, _ = await listener.accept()
                    nursery.start_soon(self._meet, sock)

    def close(self) -> None:
        """A successor has the socket's path: leave it the proxies."""
        self._scope.cancel()

    async def _meet(self, sock: trio.socket.SocketType) -> None:
        pid, uid, _gid = _UCRED.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        )
        peer = _Peer(sock, pid)
        with sock:
            try:
                if uid != os.geteuid():
                    raise zds.ZdsError("zds-peer", f"process {pid} is not ours, but of uid {uid}")
                if pid == 0:
                    raise zds.ZdsError(
                        "zds-peer",
                        "the proxy's process is in a PID namespace that we do not see",
                        "run the agent in the host's PID namespace (hostPID: true)",
                    )
                with trio.fail_after(ANSWER_S):
                    zds.read_hello(await sock.recv(zds.PACKET_BYTES))
                self._peers.append(peer)
                self._begin(peer)
                await self._tell_all(peer)
            except (zds.ZdsError, OSError, trio.TooSlowError) as error:
                what = str(error) if isinstance(error, MeshbpfError) else repr(error)
                log.warning("proxy has gone", pid=pid, why=what)
            finally:
                if peer in self._peers:
                    newest = self._peers[-1] is peer
                    self._peers.remove(peer)
                    if newest:
                        self._begin(self._peers[-1] if self._peers else None)

    def _begin(self, peer: _Peer | None) -> None:
        """This one is the newest now, and is told everything."""
        self._served.clear()
        if peer is not None:
            log.info("proxy connected", pid=peer.pid)
            peer.told.clear()
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
        self._served_changed.set()
        self._served_changed = trio.Event()

    # --- one connection -----------------------------------------------------

    async def _tell_all(self, peer: _Peer) -> None:
        snapshot_sent = False
        while True:
            changed = self._changed
            if self._peers[-1] is peer:
                if await self._tell_next(peer):
                    continue
                if not snapshot_sent:
                    refused = await self._ask(peer, zds.SnapshotSent())
                    if refused:
                        raise zds.ZdsError("zds-refused", f"the snapshot is refused: {refused}")
                    snapshot_sent = True
                    continue
            again_at = min(peer.failed.values(), default=float("inf"))
            with trio.move_on_at(again_at):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_until_end, peer, nursery.cancel_scope)
                    await changed.wait()
                    nursery.cancel_scope.cancel()
            if peer.ended:
                raise zds.ZdsError("zds-ended", peer.ended)

    async def _tell_next(self, peer: _Peer) -> bool:
        """One request, if there is one to make now."""
        for key, told in list(peer.told.items()):
            if self._wanted.get(key) is not told:
                del peer.told[key]
                peer.failed.pop(key, None)
                if refused := await self._ask(peer, zds.Delete(told.add.uid)):
                    log.warning("proxy does not let go of a pod", pod=key, why=refused)
                return True
        now = trio.current_time()
        for key, entry in list(self._wanted.items()):
            if key in self._served or peer.failed.get(key, now) > now:
                continue
            peer.told[key] = entry
            why = await self._ask(peer, entry.add, entry.netns.fd)
            if not why:
                why = await self._registered(entry, peer)
            if self._wanted.get(key) is not entry:
                return True  # it changed meanwhile
            if why:
                peer.failed[key] = trio.current_time() + self._retry_s
                log.error("proxy does not serve a pod", pod=key, why=why, retry_s=self._retry_s)
            else:
                peer.failed.pop(key, None)
                self._served[key] = entry.add.uid
                self._served_changed.set()
                self._served_changed = trio.Event()
                log.info("proxy serves pod", pod=key, pid=peer.pid)
            return True
        return False

    async def _registered(self, entry: Entry, peer: _Peer) -> str:
        """Why what the proxy has started cannot be used; empty when it can."""
        try:
            await self._started(entry, peer.pid)
        except MeshbpfError as error:
            return str(error)
        return ""

    async def _ask(self, peer: _Peer, request: zds.ZdsRequest, fd: int | None = None) -> str:
        """Why it is refused; empty when it is done."""
        rights = []
        if fd is not None:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        with trio.fail_after(ANSWER_S):
            await peer.sock.sendmsg([zds.encode(request)], rights)
            data = await peer.sock.recv(zds.PACKET_BYTES)
        if not data:
            raise zds.ZdsError("zds-ended", "it has closed the connection")
        return zds.read_answer(data)


async def _until_end(peer: _Peer, scope: trio.CancelScope) -> None:
    """Cancel the scope when the proxy says anything while nobody has asked it."""
    try:
        data = await peer.sock.recv(zds.PACKET_BYTES)
    except OSError as error:
        peer.ended = str(error)
    else:
        peer.ended = f"it says {data[:32]!r} unasked" if data else "it has closed the connection"
    scope.cancel()


@contextmanager
def _listening(path: Path) -> Iterator[trio.socket.SocketType]:
    """A listener at `path`, put there in one step; removed at the end, unless it is another's."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    with listener:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh.unlink(missing_ok=True)
            # Nobody can connect before listen(), so there is no moment of 0755.
            listener.bind(str(fresh))
            fresh.chmod(0o600)
            listener.listen(_BACKLOG)
            ours = fresh.stat().st_ino
            fresh.replace(path)
        except OSError as error:
            raise MeshbpfError(
                "zds-socket",
                f"ZDS socket {path}: {error.strerror or error}",
                "a unix socket's path may have 107 bytes; --zds-socket names another",
            ) from error
        try:
            yield trio.socket.from_stdlib_socket(listener)
        finally:
            try:
                if path.stat().st_ino == ours:
                    path.unlink()
            except FileNotFoundError:
                log.debug("ZDS socket is gone already", path=path)
