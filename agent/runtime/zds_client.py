"""The proxy's end of ZDS: is handed pods by Istio's node agent, or by another meshbpf.

Connects, says hello, and answers each request before the next; connects again
when the other side ends. Pods live on meanwhile: the next connection's snapshot
says which of them there still are.
"""

from __future__ import annotations

import array
import os
import socket
from pathlib import Path
from typing import Protocol

import trio

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.wire import zds

BACKOFF_S = 0.01
BACKOFF_MAX_S = 15.0
"""Doubled from one to the other; as ztunnel."""
_MAX_FDS = 4

log = Log("zds")


class ZdsHandler(Protocol):
    """Who serves the pods. A MeshbpfError is told to the other side, and the pod not served."""

    def begin(self) -> None:
        """A connection stands: its snapshot begins."""

    async def add(self, pod: zds.Add, netns_fd: int) -> None:
        """Serve it. The descriptor is the callee's from here on."""

    async def keep(self, uid: str) -> None:
        """It is in the snapshot, by a uid that is known."""

    async def delete(self, uid: str) -> None:
        """Serve it no more; no error when it is unknown."""

    async def snapshot(self) -> None:
        """All have been named: what was not is gone."""

    def lost(self) -> None:
        """The connection has ended."""


async def run(path: Path, handler: ZdsHandler) -> None:
    """Serve what the other side asks for, until cancelled."""
    pause_s = BACKOFF_S
    told = ""
    while True:
        try:
            with trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                await sock.connect(str(path))
                log.info("connected to the node agent", socket=path)
                pause_s, told = BACKOFF_S, ""
                await _converse(sock, handler)
        except (zds.ZdsError, OSError) as error:
            what = error.what if isinstance(error, MeshbpfError) else str(error)
            if what != told:
                log.warning("no node agent", socket=path, why=what)
                told = what
        await trio.sleep(pause_s)
        pause_s = min(2 * pause_s, BACKOFF_MAX_S)


async def _converse(sock: trio.socket.SocketType, handler: ZdsHandler) -> None:
    await sock.send(zds.hello())
    handler.begin()
    complete = False
    try:
        while True:
            data, descriptors = await _receive(sock)
            try:
                match request := zds.decode(data):
                    case zds.Add() if len(descriptors) == 1:
                        await handler.add(request, descriptors.pop())
                    case zds.Keep(uid) if not descriptors and not complete:
                        await handler.keep(uid)
                    case zds.Delete(uid) if not descriptors:
                        await handler.delete(uid)
                    case zds.SnapshotSent() if not descriptors and not complete:
                        complete = True
                        await handler.snapshot()
                    case _:
                        raise zds.ZdsError("zds-order", f"{request} with {len(descriptors)} files")
            except zds.ZdsError as error:
                await sock.send(zds.answer(error.what))
                raise
            except MeshbpfError as error:
                await sock.send(zds.answer(error.what))
            else:
                await sock.send(zds.answer())
            finally:
                _close(descriptors)
    finally:
        handler.lost()


async def _receive(sock: trio.socket.SocketType) -> tuple[bytes, list[int]]:
    """A packet and the descriptors beside it, which are the caller's to close."""
    size = socket.CMSG_SPACE(_MAX_FDS * array.array("i").itemsize)
    flags = socket.MSG_CMSG_CLOEXEC
    data, ancillary, got, _ = await sock.recvmsg(zds.PACKET_BYTES, size, flags)
    found = array.array("i")
    for level, kind, body in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(body[: len(body) - len(body) % found.itemsize])
    descriptors = list(found)
    try:
        if not data:
            raise zds.ZdsError("zds-ended", "it has closed the connection")
        if got & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise zds.ZdsError("zds-too-long", "a message that is longer than the protocol allows")
        return data, descriptors
    except BaseException:
        _close(descriptors)
        raise


def _close(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())
