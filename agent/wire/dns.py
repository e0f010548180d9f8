"""DNS messages, as far as the mesh answers them itself (RFC 1035, 6891).

Only questions are read and only answers to them are written: what the mesh
does not know is passed on to the pod's resolver and back, byte by byte, so no
record type, option or extension is ours to understand. A message that is not
one plain question is passed on likewise.

The codec is ours since it is on the path of every lookup of every pod, and small since
it needs no name compression but a pointer to the question.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from meshbpf.agent.core.address import IPAddress

CLASS_IN = 1
TYPE_A, TYPE_CNAME, TYPE_AAAA, TYPE_SRV, TYPE_OPT = 1, 5, 28, 33, 41
UDP_SIZE = 512
"""What a client takes by UDP that says nothing else (RFC 1035, 4.2.1)."""
MAX_UDP_SIZE = 1232
"""What we say that we take, and the most that we send: fits every link unfragmented
(DNS Flag Day 2020)."""
HEADER_BYTES = 12
MAX_MESSAGE_BYTES = 65535
_MAX_NAME_BYTES = 255
_LENGTH = struct.Struct("!H")
_HEADER = struct.Struct("!6H")
_QR, _AA, _TC, _RD, _RA = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080
_OPCODE = 0x7800
_TO_QUESTION = b"\xc0\x0c"  # a pointer to the name behind the header


class Status(IntEnum):
    """Response codes (RFC 1035, 4.1.1)."""

    OK = 0
    SERVER_FAILURE = 2
    NAME_ERROR = 3
    REFUSED = 5


@dataclass(frozen=True, slots=True)
class Question:
    """A query with one question, class IN."""

    id: int
    name: str
    """Lower case, without the final dot; bytes beyond ASCII are kept as Latin-1."""
    type: int
    recursion_desired: bool
    wire: bytes
    """The question section as it came: a client compares the case of its name."""
    edns: bool
    udp_size: int
    """How large an answer by UDP may be."""


@dataclass(frozen=True, slots=True)
class Service:
    """The data of an SRV record (RFC 2782); priority and weight are 0."""

    target: str
    port: int


def read_question(message: bytes) -> Question | None:
    """The question of a plain query; None for whatever else there is."""
    if len(message) < HEADER_BYTES:
        return None
    ident, flags, questions, answers, authorities, additional = _HEADER.unpack_from(message)
    if flags & (_QR | _OPCODE) or questions != 1 or answers or authorities or additional > 1:
        return None
    read = _read_name(message, HEADER_BYTES)
    if read is None:
        return None
    name, end = read
    if len(message) < end + 4:
        return None
    kind, klass = struct.unpack_from("!HH", message, end)
    if klass != CLASS_IN:
        return None
    end += 4
    size = UDP_SIZE
    if additional:
        # The root's name, OPT, and in place of a class the size.
        if len(message) < end + 11 or message[end] or message[end + 1 : end + 3] != b"\0\x29":
            return None
        (size,) = _LENGTH.unpack_from(message, end + 3)
        size = min(max(size, UDP_SIZE), MAX_UDP_SIZE)
    return Question(
        id=ident,
        name=name,
        type=kind,
        recursion_desired=bool(flags & _RD),
        wire=message[HEADER_BYTES:end],
        edns=bool(additional),
        udp_size=size,
    )


def answer(
    question: Question,
    records: Iterable[IPAddress | Service] = (),
    *,
    canonical: str | None = None,
    ttl_s: int = 0,
    status: Status = Status.OK,
    limit: int = MAX_MESSAGE_BYTES,
) -> bytes:
    """An authoritative answer; with `canonical`, the records are of that name.

    One that is larger than `limit` says "truncated" and has no records: the
    client asks again by TCP.
    """
    authoritative = _AA if status is Status.OK else 0
    flags = _QR | authoritative | _RA | int(status) | (_RD if question.recursion_desired else 0)
    owner = _TO_QUESTION
    body = []
    if canonical is not None:
        owner = _write_name(canonical)
        body.append(_record(_TO_QUESTION, TYPE_CNAME, ttl_s, owner))
    for record in records:
        if isinstance(record, Service):
            data = struct.pack("!HHH", 0, 0, record.port) + _write_name(record.target)
            body.append(_record(owner, TYPE_SRV, ttl_s, data))
        else:
            kind = TYPE_A if record.version == 4 else TYPE_AAAA
            body.append(_record(owner, kind, ttl_s, record.packed))
    option = b"\0" + struct.pack("!HHIH", TYPE_OPT, MAX_UDP_SIZE, 0, 0) if question.edns else b""
    size = HEADER_BYTES + len(question.wire) + sum(map(len, body)) + len(option)
    if size > limit:
        flags |= _TC
        body = []
    header = _HEADER.pack(question.id, flags, 1, len(body), 0, int(question.edns))
    return b"".join((header, question.wire, *body, option))


def is_answer_to(query: bytes, message: bytes) -> bool:
    """Whether `message` answers `query`: same number, and the same question where it has one."""
    if len(message) < HEADER_BYTES or len(query) < HEADER_BYTES or message[:2] != query[:2]:
        return False
    _, flags, questions, *_ = _HEADER.unpack_from(message)
    if not flags & _QR:
        return False
    asked, told = read_question(query), _read_name(message, HEADER_BYTES)
    if asked is None or questions != 1:
        return questions in (0, 1)
    return told is not None and told[0] == asked.name


def split_stream(buffer: bytearray) -> list[bytes]:
    """Take the whole messages off the front of what came by TCP (RFC 1035, 4.2.2)."""
    found = []
    while len(buffer) >= 2:
        (length,) = _LENGTH.unpack_from(buffer)
        if len(buffer) < 2 + length:
            break
        found.append(bytes(buffer[2 : 2 + length]))
        del buffer[: 2 + length]
    return found


def framed(message: bytes) -> bytes:
    """A message as it goes by TCP."""
    return _LENGTH.pack(len(message)) + message


def _read_name(message: bytes, at: int) -> tuple[str, int] | None:
    """Name and where it ends; None for a pointer, which no question has, or a broken one."""
    labels: list[str] = []
    start = at
    while at < len(message):
        length = message[at]
        at += 1
        if length == 0:
            return ".".join(labels), at
        if length > 63 or at + length > len(message) or at + length - start >= _MAX_NAME_BYTES:
            return None
        label = message[at : at + length]
        if b"." in label:
            return None  # no host has it, and as text it would be another name
        labels.append(label.decode("latin-1").lower())
        at += length
    return None


def _write_name(name: str) -> bytes:
    parts = []
    for label in name.split("."):
        data = label.encode("latin-1")
        parts.append(bytes((len(data),)) + data)
    return b"".join(parts) + b"\0"


def _record(owner: bytes, kind: int, ttl_s: int, data: bytes) -> bytes:
    return owner + struct.pack("!HHIH", kind, CLASS_IN, ttl_s, len(data)) + data
