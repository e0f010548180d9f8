"""Scripts for a sans-io connection: what the peer sends, what we call, what must come of it.

    assert (
        Playbook(HboneConnection(server=True))
        << Settings(...)          # the connection wrote this frame
        >> Preface()
        >> Settings()             # the peer sends this frame
        << Settings(ack=True)
        >> Call("respond", 1, response(200), end_stream=False)
    )

`>>` puts something in, `<<` states the next thing that comes out: a frame
that was written, an event, or a `Fault`. The script runs when it is asserted,
and everything that came out must have been stated. The peer's side is built
by hyperframe and hpack, whole, so that no code of ours checks itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from h2.errors import ErrorCodes
from hpack import Decoder, Encoder
from hyperframe import frame as hf

from meshbpf.agent.wire.errors import PeerError
from meshbpf.agent.wire.events import DataReceived
from meshbpf.agent.wire.frames import PREFACE
from meshbpf.agent.wire.hbone import HboneConnection


@dataclass(frozen=True)
class Preface:
    """The client's first 24 bytes."""


@dataclass(frozen=True)
class Raw:
    """Bytes as they are."""

    data: bytes


@dataclass(frozen=True)
class Settings:
    values: Mapping[int, int] = field(default_factory=dict)
    ack: bool = False


@dataclass(frozen=True)
class Head:
    """HEADERS, in one frame."""

    stream_id: int
    fields: tuple[tuple[bytes, bytes], ...]
    end: bool = False


@dataclass(frozen=True)
class Body:
    """DATA; `padding` None is a frame without the PADDED flag."""

    stream_id: int
    payload: bytes = b""
    end: bool = False
    padding: int | None = None


@dataclass(frozen=True)
class Window:
    stream_id: int
    increment: int


@dataclass(frozen=True)
class Reset:
    stream_id: int
    code: ErrorCodes


@dataclass(frozen=True)
class Away:
    last_stream_id: int
    code: ErrorCodes


@dataclass(frozen=True)
class Ping:
    payload: bytes
    ack: bool = False


@dataclass(frozen=True)
class Call:
    """A call of ours: the method's name and arguments."""

    method: str
    args: tuple[object, ...]
    kwargs: Mapping[str, object]

    def __init__(self, method: str, *args: object, **kwargs: object) -> None:
        object.__setattr__(self, "method", method)
        object.__setattr__(self, "args", args)
        object.__setattr__(self, "kwargs", kwargs)


@dataclass(frozen=True)
class Got:
    """Payload that was reported, as bytes: events hold views."""

    stream_id: int
    payload: bytes


@dataclass(frozen=True)
class Fault:
    """The connection raised PeerError with this code."""

    code: ErrorCodes


class Playbook:
    """A script over one connection; see the module."""

    def __init__(self, connection: HboneConnection) -> None:
        self.connection = connection
        self.peer_encoder = Encoder()
        self.peer_decoder = Decoder()
        self._script: list[tuple[str, object]] = []
        self._start = True

    def __rshift__(self, item: object) -> Playbook:
        self._script.append((">>", item))
        return self

    def __lshift__(self, item: object) -> Playbook:
        self._script.append(("<<", item))
        return self

    def __bool__(self) -> bool:
        """Run the script; AssertionError shows it with what came out instead."""
        script, self._script = self._script, []
        happened: list[tuple[str, object]] = []
        if self._start:
            self._start = False
            self.connection.start()
            happened += self._outcome([])
        for side, item in script:
            if side == ">>":
                happened.append((">>", item))
                happened += self._apply(item)
        if happened != script:
            raise AssertionError(_difference(script, happened))
        return True

    def opened(self) -> Playbook:
        """Past the exchange of settings, which most scripts are not about."""
        server = self.connection._server
        self.connection.start()
        self._start = False
        if server:
            self._apply(Preface())
        self._apply(Settings())
        self._apply(Settings(ack=True))
        return self

    def _apply(self, item: object) -> list[tuple[str, object]]:
        events: list[object] = []
        try:
            if isinstance(item, Call):
                getattr(self.connection, item.method)(*item.args, **item.kwargs)
            else:
                data = memoryview(encode(item, self.peer_encoder))
                for event in self.connection.receive(data):
                    if isinstance(event, DataReceived):
                        payload = b"".join(event.views)
                        assert len(payload) == event.size
                        events.append(Got(event.stream_id, payload))
                    else:
                        events.append(event)
        except PeerError as fault:
            events.append(Fault(fault.error_code))
        return self._outcome(events)

    def _outcome(self, events: list[object]) -> list[tuple[str, object]]:
        written = bytes(self.connection.out)
        self.connection.out.clear()
        return [("<<", each) for each in (*events, *decode(written, self.peer_decoder))]


def encode(item: object, encoder: Encoder) -> bytes:
    """The bytes of a frame."""
    built: hf.Frame
    match item:
        case Preface():
            return PREFACE
        case Raw(data):
            return data
        case Settings(values, ack):
            built = hf.SettingsFrame(0, settings=dict(values), flags=["ACK"] if ack else [])
        case Head(stream_id, fields, end):
            flags = ["END_HEADERS", "END_STREAM"] if end else ["END_HEADERS"]
            built = hf.HeadersFrame(stream_id, encoder.encode(fields), flags=flags)
        case Body(stream_id, payload, end, padding):
            built = hf.DataFrame(stream_id, payload, flags=["END_STREAM"] if end else [])
            if padding is not None:
                built.flags.add("PADDED")
                built.pad_length = padding
        case Window(stream_id, increment):
            built = hf.WindowUpdateFrame(stream_id, window_increment=increment)
        case Reset(stream_id, code):
            built = hf.RstStreamFrame(stream_id, error_code=code)
        case Away(last, code):
            built = hf.GoAwayFrame(0, last_stream_id=last, error_code=code)
        case Ping(payload, ack):
            built = hf.PingFrame(0, payload, flags=["ACK"] if ack else [])
        case _:
            raise TypeError(f"{item!r} cannot be sent")
    return built.serialize()


def decode(data: bytes, decoder: Decoder) -> list[object]:
    """The frames that we wrote."""
    frames: list[object] = []
    if data.startswith(PREFACE):
        frames.append(Preface())
        data = data[len(PREFACE) :]
    view = memoryview(data)
    while view:
        frame, size = hf.Frame.parse_frame_header(view[:9])
        frame.parse_body(view[9 : 9 + size])
        view = view[9 + size :]
        frames.append(_described(frame, decoder))
    return frames


def _described(frame: hf.Frame, decoder: Decoder) -> object:
    match frame:
        case hf.SettingsFrame():
            return Settings(dict(frame.settings), "ACK" in frame.flags)
        case hf.HeadersFrame():
            fields = tuple((bytes(n), bytes(v)) for n, v in decoder.decode(frame.data, raw=True))
            return Head(frame.stream_id, fields, "END_STREAM" in frame.flags)
        case hf.DataFrame():
            return Body(frame.stream_id, frame.data, "END_STREAM" in frame.flags)
        case hf.WindowUpdateFrame():
            return Window(frame.stream_id, frame.window_increment)
        case hf.RstStreamFrame():
            return Reset(frame.stream_id, ErrorCodes(frame.error_code))
        case hf.GoAwayFrame():
            return Away(frame.last_stream_id, ErrorCodes(frame.error_code))
        case hf.PingFrame():
            return Ping(frame.opaque_data, "ACK" in frame.flags)
    raise TypeError(f"{frame!r} was not expected of us")


def _difference(script: list[tuple[str, object]], happened: list[tuple[str, object]]) -> str:
    lines = ["the script and what happened:"]
    for index in range(max(len(script), len(happened))):
        said = _line(script, index)
        was = _line(happened, index)
        lines.append(f"    {was}" if said == was else f"  - {said}\n  + {was}")
    return "\n".join(lines)


def _line(entries: list[tuple[str, object]], index: int) -> str:
    if index >= len(entries):
        return "(nothing)"
    side, item = entries[index]
    if isinstance(item, (Body, Got)) and len(item.payload) > 32:
        item = replace(item, payload=item.payload[:32] + b"...")
    return f"{side} {item!r}"
