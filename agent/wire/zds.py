"""ZDS: how a node agent hands pods to a proxy that runs beside it, as messages.

Source: ztunnel's proto/zds.proto and src/inpod. Over a SOCK_SEQPACKET socket one
packet is one message. The proxy says hello first; then each request of the agent
is answered before the next. An `Add` comes with one descriptor, the pod's network
namespace; nothing else does. All that are there are added first, then
`SnapshotSent` says so, once: the proxy lets go of what was not named.
"""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import DecodeError

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.wire.pb import zds_pb2 as pb

PACKET_BYTES = 1024
"""The largest message; as ztunnel's read buffer."""


class ZdsError(MeshbpfError):
    """The other side does not keep to the protocol, or has gone."""


@dataclass(frozen=True, slots=True)
class Add:
    """Serve this pod. Its namespace comes beside it, by SCM_RIGHTS."""

    uid: str
    name: str
    namespace: str
    service_account: str


@dataclass(frozen=True, slots=True)
class Keep:
    """Before the snapshot: serve on what you know by this uid."""

    uid: str


@dataclass(frozen=True, slots=True)
class Delete:
    """Serve it no more."""

    uid: str


@dataclass(frozen=True, slots=True)
class SnapshotSent:
    """All there are have been named."""


ZdsRequest = Add | Keep | Delete | SnapshotSent


def hello() -> bytes:
    """What the proxy says first."""
    return pb.ZdsHello(version=pb.V1).SerializeToString()


def read_hello(data: bytes) -> None:
    """Raises ZdsError for anything but version 1."""
    try:
        version = pb.ZdsHello.FromString(data).version
    except DecodeError as error:
        raise ZdsError("zds-hello", f"{data[:32]!r} is no ZDS hello") from error
    if version != pb.V1:
        raise ZdsError("zds-version", f"the proxy speaks ZDS version {version}, we speak 1")


def encode(request: ZdsRequest) -> bytes:
    """The packet. Raises ZdsError for one that the other side could not read."""
    message = pb.WorkloadRequest()
    match request:
        case Add(uid, name, namespace, account):
            message.add.uid = uid
            info = message.add.workload_info
            info.name, info.namespace, info.service_account = name, namespace, account
        case Keep(uid):
            message.keep.uid = uid
        case Delete(uid):
            message.delete.uid = uid
        case SnapshotSent():
            message.snapshot_sent.SetInParent()
    data = message.SerializeToString()
    if len(data) > PACKET_BYTES:
        raise ZdsError("zds-too-long", f"a message of {len(data)} bytes, {PACKET_BYTES} at most")
    return data


def decode(data: bytes) -> ZdsRequest:
    """A packet of the agent. Raises ZdsError."""
    try:
        message = pb.WorkloadRequest.FromString(data)
    except DecodeError as error:
        raise ZdsError("zds-message", f"a packet that is no ZDS request: {error}") from error
    match message.WhichOneof("payload"):
        case "add":
            if not message.add.HasField("workload_info"):
                raise ZdsError("zds-message", f"an add of {message.add.uid} does not say who it is")
            info = message.add.workload_info
            return Add(message.add.uid, info.name, info.namespace, info.service_account)
        case "keep":
            return Keep(message.keep.uid)
        case "delete":
            return Delete(message.delete.uid)
        case "snapshot_sent":
            return SnapshotSent()
        case _:
            raise ZdsError("zds-message", "a ZDS request that says nothing we know")


def answer(error: str = "") -> bytes:
    """What each request is answered with: done, or why not."""
    response = pb.WorkloadResponse()
    response.ack.SetInParent()
    if error:
        response.ack.error = error[: PACKET_BYTES // 2]
    return response.SerializeToString()


def read_answer(data: bytes) -> str:
    """Why the proxy refuses; empty when it has done it. Raises ZdsError."""
    try:
        response = pb.WorkloadResponse.FromString(data)
    except DecodeError as error:
        raise ZdsError("zds-answer", f"{data[:32]!r} is no ZDS answer") from error
    if not response.HasField("ack"):
        raise ZdsError("zds-answer", "a ZDS answer that is no ack")
    return response.ack.error
