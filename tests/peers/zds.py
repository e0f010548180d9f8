"""The node's end of ZDS, the protocol by which ztunnel is handed pods.

One SOCK_SEQPACKET packet is one protobuf message, with no length before it. An
`add` carries the pod's network namespace as a descriptor; each message has its
answer before the next is sent. Only four messages are needed, so they are
encoded here by hand: field numbers from ztunnel's proto/zds.proto.
"""

from __future__ import annotations

import array
import socket
from pathlib import Path

from tests.progs.program import BedError

ANSWER_LIMIT_S = 10.0
PACKET_BYTES = 1024  # as large as ztunnel's own read buffer

_HELLO_V1 = bytes([0x08, 0x01])  # ZdsHello{version=1: V1}
_SNAPSHOT_SENT = bytes([0x1A, 0x00])  # WorkloadRequest{snapshot_sent=3: {}}
_ACCEPTED = bytes([0x0A, 0x00])  # WorkloadResponse{ack=1: {}}


def _field(number: int, value: bytes) -> bytes:
    """A length-delimited field shorter than 128 bytes: tag, length, bytes."""
    if len(value) > 127:
        raise ValueError(f"{len(value)} bytes need a longer length than one byte")
    return bytes([number << 3 | 2, len(value)]) + value


def add_message(uid: str, name: str, namespace: str, service_account: str) -> bytes:
    """WorkloadRequest{add=1: {uid=1, info=2: {name=1, namespace=2, service_account=3}}}."""
    info = b"".join(
        _field(number, text.encode())
        for number, text in enumerate((name, namespace, service_account), start=1)
    )
    return _field(1, _field(1, uid.encode()) + _field(2, info))


def delete_message(uid: str) -> bytes:
    """WorkloadRequest{del=2: {uid=2}}."""
    return _field(2, _field(2, uid.encode()))


class ZdsServer:
    """Listens for one ztunnel, and then gives it pods one after the other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.settimeout(ANSWER_LIMIT_S)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._peer: socket.socket | None = None

    def meet(self, *, snapshot: bool = True) -> None:
        """Wait for the proxy's hello, and tell it, unless not yet, that these are all pods."""
        peer, _ = self._listener.accept()
        peer.settimeout(ANSWER_LIMIT_S)
        self._peer = peer
        hello = peer.recv(PACKET_BYTES)
        if hello != _HELLO_V1:
            raise BedError(f"ztunnel's hello is {hello.hex()}, not version 1")
        if snapshot:
            self.snapshot()

    def snapshot(self) -> None:
        """Tell that all pods there are have been named."""
        self._tell(_SNAPSHOT_SENT)

    def add(self, uid: str, name: str, namespace: str, account: str, netns: Path) -> None:
        """Hand over a pod; BedError with ztunnel's words when it refuses."""
        with netns.open("rb") as handle:
            self._tell(add_message(uid, name, namespace, account), handle.fileno())

    def delete(self, uid: str) -> None:
        self._tell(delete_message(uid))

    def close(self) -> None:
        for sock in (self._peer, self._listener):
            if sock is not None:
                sock.close()
        self.path.unlink(missing_ok=True)

    def _tell(self, message: bytes, descriptor: int | None = None) -> None:
        if self._peer is None:
            raise BedError("no ztunnel has connected")
        rights = []
        if descriptor is not None:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
        self._peer.sendmsg([message], rights)
        answer = self._peer.recv(PACKET_BYTES)
        if answer != _ACCEPTED:
            raise BedError(f"ztunnel refuses: {answer!r}")
