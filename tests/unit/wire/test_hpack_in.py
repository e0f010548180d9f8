"""Reading header blocks: the short way says what hpack's own decoder says, or nothing."""

from __future__ import annotations

import pytest
from h2.errors import ErrorCodes
from hpack import Decoder, Encoder
from hpack.exceptions import HPACKError
from hypothesis import given
from hypothesis import strategies as st

from meshbpf.agent.wire.errors import PeerError
from meshbpf.agent.wire.hpack_in import HeaderDecoder, _plain
from meshbpf.agent.wire.hpack_out import LiteralEncoder

LIMIT = 64 * 1024

names = st.one_of(
    st.sampled_from([b":status", b":method", b":authority", b"baggage", b"forwarded"]),
    st.binary(min_size=1, max_size=200),
)
lists = st.lists(st.tuples(names, st.binary(max_size=300)), max_size=8)
# Blocks that begin like plain ones and may go on as anything.
pieces = st.one_of(
    st.sampled_from([b"\x88", b"\x8c", b"\x00", b"\x01", b"\x02", b"\x08", b"\x7f", b"\x20"]),
    st.binary(max_size=3),
    st.binary(max_size=20).map(lambda text: bytes((len(text),)) + text),
)


def decoder() -> HeaderDecoder:
    return HeaderDecoder(Decoder(), max_list_bytes=LIMIT)


@given(st.lists(pieces, max_size=12).map(b"".join))
def test_what_is_read_the_short_way_the_library_reads_alike(block: bytes) -> None:
    short = _plain(block, LIMIT)
    if short is None:
        return
    library = Decoder().decode(block, raw=True)
    assert short == tuple((bytes(name), bytes(value)) for name, value in library)


@given(st.lists(lists, max_size=4))
def test_our_own_blocks_come_back(blocks: list[list[tuple[bytes, bytes]]]) -> None:
    encoder, reader = LiteralEncoder(), decoder()
    for headers in blocks:
        assert reader.decode(encoder.encode(headers)) == tuple(headers)


@given(st.lists(st.tuples(st.booleans(), lists), max_size=6))
def test_plain_blocks_between_others_leave_the_table_as_it_is(
    blocks: list[tuple[bool, list[tuple[bytes, bytes]]]],
) -> None:
    compressing, plain, reader = Encoder(), LiteralEncoder(), decoder()
    plain.encode([])  # its announcement of a table of size 0 would clear the table
    for compressed, headers in blocks:
        encoded = compressing.encode(headers) if compressed else plain.encode(headers)
        assert reader.decode(encoded) == tuple(headers)


def test_a_usual_request_and_answer_are_read_the_short_way() -> None:
    encoder = LiteralEncoder()
    encoder.encode([])
    for headers in (
        [(b":method", b"CONNECT"), (b":authority", b"198.18.0.1:80"), (b"baggage", b"k=" * 90)],
        [(b":status", b"200"), (b"baggage", b"k=v")],
        [(b":status", b"503")],
    ):
        assert _plain(encoder.encode(headers), LIMIT) == tuple(headers)


@pytest.mark.parametrize("block", [b"\xff", b"\x80", b"\x00\x05ab", b"\x01"])
def test_a_block_that_is_none_is_a_peers_fault(block: bytes) -> None:
    with pytest.raises(HPACKError):
        Decoder().decode(block, raw=True)
    with pytest.raises(PeerError) as fault:
        decoder().decode(block)
    assert fault.value.error_code is ErrorCodes.PROTOCOL_ERROR
