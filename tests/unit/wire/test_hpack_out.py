"""Header blocks without compression state, read by hpack's own decoder."""

from __future__ import annotations

from hpack import Decoder
from hypothesis import given
from hypothesis import strategies as st

from meshbpf.agent.wire.hpack_out import LiteralEncoder

names = st.one_of(
    st.sampled_from([b":status", b":method", b":authority", b"baggage", b"forwarded"]),
    st.binary(min_size=1, max_size=200),
)
lists = st.lists(st.tuples(names, st.binary(max_size=300)), max_size=8)


@given(st.lists(lists, max_size=4))
def test_a_decoder_reads_back_what_was_written(blocks: list[list[tuple[bytes, bytes]]]) -> None:
    encoder, decoder = LiteralEncoder(), Decoder()
    for headers in blocks:
        read = decoder.decode(encoder.encode(headers), raw=True)
        assert [(bytes(name), bytes(value)) for name, value in read] == headers


def test_the_decoder_keeps_no_table() -> None:
    encoder, decoder = LiteralEncoder(), Decoder()
    for index in range(100):
        decoder.decode(encoder.encode([(b"x-%d" % index, b"y")]))
    assert len(decoder.header_table.dynamic_entries) == 0


def test_a_smaller_table_of_the_peers_needs_no_update() -> None:
    encoder, decoder = LiteralEncoder(), Decoder()
    decoder.decode(encoder.encode([(b":status", b"200")]))
    # The peer lowers its setting; a decoder may now insist on a size update
    # unless the table is within the new bound already.
    decoder.max_allowed_table_size = 0
    encoder.header_table_size = 0
    assert decoder.decode(encoder.encode([(b":status", b"200")])) == [(":status", "200")]
