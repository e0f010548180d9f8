"""The frame splitter: any cut of the bytes gives the same frames, and none crashes it."""

from __future__ import annotations

import contextlib
import itertools

from hyperframe import frame as hf
from hypothesis import given
from hypothesis import strategies as st

from meshbpf.agent.wire.errors import PeerError
from meshbpf.agent.wire.frames import PREFACE, Data, Frame, FrameSplitter, header

MAX_FRAME_BYTES = 1 << 20

payloads = st.binary(max_size=600)
stream_ids = st.integers(1, 2**31 - 1)


@st.composite
def data_frames(draw: st.DrawFn) -> hf.Frame:
    frame = hf.DataFrame(draw(stream_ids), draw(payloads))
    if draw(st.booleans()):
        frame.flags.add("PADDED")
        frame.pad_length = draw(st.integers(0, 255))
    if draw(st.booleans()):
        frame.flags.add("END_STREAM")
    return frame


control_frames = st.one_of(
    st.builds(hf.PingFrame, st.just(0), st.binary(min_size=8, max_size=8)),
    st.builds(lambda s, n: hf.WindowUpdateFrame(s, n), stream_ids, st.integers(1, 2**31 - 1)),
    st.builds(lambda s, b: hf.HeadersFrame(s, b, flags=["END_HEADERS"]), stream_ids, payloads),
    st.builds(lambda s: hf.RstStreamFrame(s, 8), stream_ids),
)
frames = st.lists(st.one_of(data_frames(), control_frames), max_size=12)
cuts = st.lists(st.integers(1, 97), min_size=1, max_size=40)


def splitter() -> FrameSplitter:
    """A splitter past SETTINGS."""
    fresh = FrameSplitter(server=False, max_frame_bytes=MAX_FRAME_BYTES)
    assert list(fresh.feed(memoryview(hf.SettingsFrame(0).serialize())))
    return fresh


def pieces_of(data: bytes, sizes: list[int]) -> list[bytes]:
    """`data` in pieces of these sizes, over and over."""
    pieces = []
    for size in itertools.cycle(sizes):
        if not data:
            return pieces
        pieces.append(data[:size])
        data = data[size:]
    return pieces


def seen(splitting: FrameSplitter, pieces: list[bytes]) -> list[tuple[object, ...]]:
    """What came out, with the pieces of each DATA frame put together."""
    out: list[tuple[object, ...]] = []
    stream_id, payload, announced, padding = 0, b"", 0, 0
    for piece in pieces:
        # The buffer is overwritten after each call, as the relay does it.
        buffer = bytearray(piece)
        for item in splitting.feed(memoryview(buffer)):
            if isinstance(item, Frame):
                out.append(("frame", item.raw))
                continue
            if item.announced or item.stream_id != stream_id:
                stream_id = item.stream_id
            payload += bytes(item.payload)
            announced += item.announced
            padding += item.padding
            if len(payload) + padding == announced:
                out.append(("data", stream_id, payload, announced, padding, item.ends_stream))
                stream_id, payload, announced, padding = 0, b"", 0, 0
        buffer[:] = bytes(len(buffer))
    return out


def expected(frame: hf.Frame) -> tuple[object, ...]:
    raw = frame.serialize()
    if not isinstance(frame, hf.DataFrame):
        return ("frame", raw)
    padding = 1 + frame.pad_length if "PADDED" in frame.flags else 0
    announced = len(raw) - 9
    return (
        "data",
        frame.stream_id,
        bytes(frame.data),
        announced,
        padding,
        "END_STREAM" in frame.flags,
    )


@given(frames, cuts)
def test_any_cut_of_the_bytes_gives_the_same_frames(sent: list[hf.Frame], sizes: list[int]) -> None:
    data = b"".join(each.serialize() for each in sent)
    assert seen(splitter(), pieces_of(data, sizes)) == [expected(each) for each in sent]


@given(st.binary(max_size=300), cuts, st.booleans())
def test_garbage_is_a_peer_error_or_frames_and_nothing_else(
    garbage: bytes, sizes: list[int], server: bool
) -> None:
    fresh = FrameSplitter(server=server, max_frame_bytes=MAX_FRAME_BYTES)
    start = PREFACE if server else b""
    # Anything but PeerError is the crash that this looks for.
    with contextlib.suppress(PeerError):
        for piece in pieces_of(start + hf.SettingsFrame(0).serialize() + garbage, sizes):
            for item in fresh.feed(memoryview(piece)):
                assert isinstance(item, (Frame, Data))


@given(st.integers(0, 2**24 - 1), st.sampled_from([0, 1, 3, 9]), stream_ids)
def test_a_written_header_is_what_hyperframe_reads(size: int, kind: int, stream_id: int) -> None:
    frame, length = hf.Frame.parse_frame_header(memoryview(header(size, kind, 0, stream_id)))
    assert (length, frame.type, frame.stream_id) == (size, kind, stream_id)


def test_a_data_frame_is_handed_on_before_it_is_complete() -> None:
    fresh = splitter()
    half = header(1000, 0, 0, 7) + bytes(400)
    (piece,) = fresh.feed(memoryview(half))
    assert isinstance(piece, Data)
    assert (len(piece.payload), piece.announced, piece.ends_stream) == (400, 1000, False)


def test_no_more_than_one_frame_is_ever_held_back() -> None:
    fresh = splitter()
    ping = hf.PingFrame(0, bytes(8)).serialize()
    for _ in range(1000):
        assert len(list(fresh.feed(memoryview(ping)))) == 1
        assert len(fresh._partial) == 0
    list(fresh.feed(memoryview(ping[:-1])))
    assert len(fresh._partial) == len(ping) - 1
