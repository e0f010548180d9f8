"""Our codec against dnspython's, and against whatever bytes there are."""

from __future__ import annotations

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshbpf.agent.wire.dns import (
    MAX_UDP_SIZE,
    Question,
    Service,
    Status,
    answer,
    framed,
    is_answer_to,
    read_question,
    split_stream,
)
from tests.unit.core.builders import ip


def question(name: str = "www.example.com", kind: str = "A", **options: int) -> Question:
    read = read_question(dns.message.make_query(name, kind, **options).to_wire())
    assert read is not None
    return read


def test_a_plain_query_is_read_without_regard_to_case() -> None:
    read = question("WWW.Example.COM", "AAAA")
    assert (read.name, read.type, read.recursion_desired) == ("www.example.com", 28, True)
    assert (read.edns, read.udp_size) == (False, 512)


@pytest.mark.parametrize(("said", "taken"), [(100, 512), (700, 700), (65535, MAX_UDP_SIZE)])
def test_the_size_that_a_client_takes_is_kept_in_bounds(said: int, taken: int) -> None:
    read = question(use_edns=0, payload=said)
    assert (read.edns, read.udp_size) == (True, taken)


def test_an_answer_is_what_dnspython_reads_in_it() -> None:
    query = dns.message.make_query("Www.Example.com", "A", use_edns=0)
    read = read_question(query.to_wire())
    assert read is not None
    wire = answer(read, [ip("198.18.0.1"), ip("198.18.0.2")], canonical="www.example", ttl_s=30)
    told = dns.message.from_wire(wire)
    assert query.is_response(told)
    assert told.flags & dns.flags.AA
    assert told.flags & dns.flags.RA
    alias, records = told.answer
    assert alias.to_text() == "Www.Example.com. 30 IN CNAME www.example."
    assert {str(record) for record in records} == {"198.18.0.1", "198.18.0.2"}
    assert is_answer_to(query.to_wire(), wire)


def test_srv_and_aaaa_records_are_read_by_dnspython() -> None:
    told = dns.message.from_wire(
        answer(question("_http._tcp.www.example.com", "SRV"), [Service("www.example.com", 80)])
    )
    assert told.answer[0].to_text().endswith(" SRV 0 0 80 www.example.com.")
    told = dns.message.from_wire(answer(question(kind="AAAA"), [ip("fd00:6d62::1")]))
    assert told.answer[0].rdtype == dns.rdatatype.AAAA


def test_an_empty_answer_is_no_error_and_a_failure_is_not_authoritative() -> None:
    told = dns.message.from_wire(answer(question()))
    assert (told.rcode(), told.answer) == (dns.rcode.NOERROR, [])
    told = dns.message.from_wire(answer(question(), status=Status.SERVER_FAILURE))
    assert told.rcode() == dns.rcode.SERVFAIL
    assert not told.flags & dns.flags.AA


def test_an_answer_that_does_not_fit_says_so_and_has_no_records() -> None:
    many = [ip(f"198.18.0.{n}") for n in range(200)]
    told = dns.message.from_wire(answer(question(), many, limit=512))
    assert told.flags & dns.flags.TC
    assert told.answer == []
    assert len(answer(question(), many)) > 3000


def test_what_is_no_plain_question_is_none() -> None:
    query = dns.message.make_query("a.b", "A")
    wire = query.to_wire()
    assert read_question(wire[:11]) is None
    assert read_question(wire[:-1]) is None
    assert read_question(dns.message.make_response(query).to_wire()) is None
    assert read_question(wire[:12] + b"\xc0\x0c" + wire[-4:]) is None, "a pointer"
    query.question.append(query.question[0])
    assert read_question(query.to_wire()) is None, "two questions"


def test_an_answer_to_another_question_is_not_taken() -> None:
    query = dns.message.make_query("a.b", "A", id=7)
    other = dns.message.make_query("b.a", "A", id=7)
    assert not is_answer_to(query.to_wire(), dns.message.make_response(other).to_wire())
    assert not is_answer_to(query.to_wire(), query.to_wire()), "a question is no answer"


@given(st.binary(max_size=600))
def test_no_bytes_raise_anything(data: bytes) -> None:
    read = read_question(data)
    if read is not None:
        assert answer(read)[:2] == data[:2]
    is_answer_to(data, data)


@given(st.lists(st.binary(max_size=300), max_size=5), st.integers(1, 7))
def test_a_stream_is_split_where_it_was_framed(messages: list[bytes], step: int) -> None:
    stream = b"".join(map(framed, messages))
    buffer, found = bytearray(), []
    for at in range(0, len(stream), step):
        buffer += stream[at : at + step]
        found += split_stream(buffer)
    assert found == messages
    assert not buffer
