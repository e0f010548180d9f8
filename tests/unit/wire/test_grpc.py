"""gRPC's framing, headers and statuses, without a connection."""

from __future__ import annotations

from itertools import pairwise

import pytest
from h2.errors import ErrorCodes
from hyperframe import frame as hf
from hypothesis import given
from hypothesis import strategies as st

from meshbpf.agent.wire.grpc import (
    Decoder,
    GoAway,
    GoAwayFilter,
    GrpcError,
    Status,
    encode,
    request_headers,
    reset_error,
    status_of,
)

METHOD = "runtime.v1.RuntimeService/Version"


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """`data` in pieces, cut at the given places."""
    edges = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


@given(st.lists(st.binary(max_size=300)), st.lists(st.integers(0, 10_000)))
def test_messages_come_whole_however_data_is_cut(messages: list[bytes], places: list[int]) -> None:
    decoder = Decoder(METHOD)
    found = []
    for piece in cut(b"".join(map(encode, messages)), places):
        found.extend(decoder.feed(piece))
    decoder.finish()
    assert found == messages


def test_a_message_has_five_bytes_before_it() -> None:
    assert encode(b"abc") == b"\0\0\0\0\x03abc"


def test_a_stream_that_ends_inside_a_message_is_an_error() -> None:
    decoder = Decoder(METHOD)
    assert list(decoder.feed(encode(b"abc")[:-1])) == []
    with pytest.raises(GrpcError, match="ended inside a message") as caught:
        decoder.finish()
    assert caught.value.status is Status.INTERNAL


def test_a_compressed_message_is_refused() -> None:
    with pytest.raises(GrpcError, match="compressed"):
        list(Decoder(METHOD).feed(b"\x01\0\0\0\x01x"))


def test_an_oversized_message_is_refused_by_its_prefix_alone() -> None:
    decoder = Decoder(METHOD, limit_bytes=10)
    assert list(decoder.feed(encode(b"x" * 10))) == [b"x" * 10]
    with pytest.raises(GrpcError, match="11 bytes, the limit is 10") as caught:
        list(decoder.feed(encode(b"x" * 11)[:5]))
    assert caught.value.status is Status.RESOURCE_EXHAUSTED


def test_a_call_is_a_post_that_wants_trailers() -> None:
    fields = dict(request_headers(METHOD, "localhost", metadata=[("x-a", "b")]))
    assert fields[":method"] == "POST"
    assert fields[":path"] == "/" + METHOD
    assert fields["te"] == "trailers"
    assert fields["content-type"] == "application/grpc"
    assert fields["x-a"] == "b"
    assert "grpc-timeout" not in fields


@pytest.mark.parametrize(
    ("timeout_s", "text"), [(1.5, "1500m"), (0.0001, "1m"), (1e9, "99999999m")]
)
def test_a_timeout_has_eight_digits_at_most(timeout_s: float, text: str) -> None:
    assert ("grpc-timeout", text) in request_headers(METHOD, "h", timeout_s=timeout_s)


def ok(*more: tuple[str, str]) -> list[tuple[str, str]]:
    return [(":status", "200"), ("content-type", "application/grpc"), *more]


def test_headers_before_messages_say_nothing_of_the_end() -> None:
    assert status_of(METHOD, ok()) is None
    assert (
        status_of(METHOD, [(":status", "200"), ("content-type", "application/grpc+proto")]) is None
    )
    assert status_of(METHOD, [("x-trailer", "1")]) is None


def test_trailers_say_how_the_call_went() -> None:
    assert status_of(METHOD, [("grpc-status", "0")]) is Status.OK
    error = status_of(METHOD, [("grpc-status", "5"), ("grpc-message", "no%20pod%0Aof that name")])
    assert isinstance(error, GrpcError)
    assert error.status is Status.NOT_FOUND
    assert error.code == "grpc-not-found"
    assert error.what.endswith("NOT_FOUND: no pod\nof that name")


@pytest.mark.parametrize("code", ["17", "99", "100000", "x", "-1", "", "²", "1" * 5000])
def test_a_code_that_nobody_knows_is_unknown(code: str) -> None:
    error = status_of(METHOD, [("grpc-status", code)])
    assert isinstance(error, GrpcError)
    assert error.status is Status.UNKNOWN


@pytest.mark.parametrize(
    ("http", "status"),
    [
        ("401", Status.UNAUTHENTICATED),
        ("404", Status.UNIMPLEMENTED),
        ("503", Status.UNAVAILABLE),
        ("500", Status.UNKNOWN),
        ("²00", Status.UNKNOWN),
    ],
)
def test_an_http_error_becomes_a_status(http: str, status: Status) -> None:
    error = status_of(METHOD, [(":status", http)])
    assert isinstance(error, GrpcError)
    assert error.status is status


def test_an_answer_that_is_not_grpc_is_refused() -> None:
    error = status_of(METHOD, [(":status", "200"), ("content-type", "text/html; charset=utf-8")])
    assert isinstance(error, GrpcError)
    assert "text/html" in error.what


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (ErrorCodes.CANCEL, Status.CANCELLED),
        (ErrorCodes.REFUSED_STREAM, Status.UNAVAILABLE),
        (ErrorCodes.ENHANCE_YOUR_CALM, Status.RESOURCE_EXHAUSTED),
        (ErrorCodes.PROTOCOL_ERROR, Status.INTERNAL),
        (0x1234, Status.UNKNOWN),
    ],
)
def test_a_reset_becomes_a_status(code: int, status: Status) -> None:
    assert reset_error(METHOD, int(code)).status is status


@given(st.lists(st.integers(0, 10_000)), st.booleans())
def test_goaway_is_taken_out_and_nothing_else(places: list[int], debug: bool) -> None:
    before = [
        hf.SettingsFrame(0, settings={3: 100}).serialize(),
        hf.DataFrame(1, b"\0" * 70).serialize(),
        hf.PingFrame(0, b"12345678").serialize(),
    ]
    goaway = hf.GoAwayFrame(
        last_stream_id=5, error_code=11, additional_data=b"too_many_pings" if debug else b""
    ).serialize()
    after = hf.DataFrame(1, b"more", flags=["END_STREAM"]).serialize()
    taken: list[GoAway] = []
    passed = bytearray()
    parts = GoAwayFilter()
    for piece in cut(b"".join([*before, goaway, after]), places):
        for part in parts.feed(piece):
            if isinstance(part, GoAway):
                taken.append(part)
                assert bytes(passed) == b"".join(before)
            else:
                passed += part
    assert taken == [GoAway(5, 11)]
    assert taken[0].reason == "the server is going away: ENHANCE_YOUR_CALM"
    assert bytes(passed) == b"".join(before) + after


def test_a_goaway_too_short_is_left_for_h2_to_refuse() -> None:
    malformed = b"\0\0\x04\x07\0\0\0\0\0" + b"abcd"
    assert b"".join(p for p in GoAwayFilter().feed(malformed) if isinstance(p, bytes)) == malformed
