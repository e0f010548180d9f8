"""ZDS messages: what we say can be read by ourselves, and bytes of ztunnel's by us."""

from __future__ import annotations

import pytest

from meshbpf.agent.wire import zds

pytestmark = pytest.mark.compat

ADD = zds.Add("0af1", "web-0", "shop", "web")


@pytest.mark.parametrize(
    "request_", [ADD, zds.Keep("0af1"), zds.Delete("0af1"), zds.SnapshotSent()], ids=repr
)
def test_a_request_is_read_as_it_was_meant(request_: zds.ZdsRequest) -> None:
    assert zds.decode(zds.encode(request_)) == request_


def test_bytes_are_those_of_ztunnel_s_own_numbers() -> None:
    assert zds.hello() == b"\x08\x01"
    assert zds.encode(zds.SnapshotSent()) == b"\x1a\x00"
    assert zds.encode(zds.Delete("u")) == b"\x12\x03\x12\x01u"
    assert zds.encode(zds.Keep("u")) == b"\x2a\x03\x0a\x01u"
    assert zds.encode(zds.Add("u", "n", "s", "a")) == (
        b"\x0a\x0e\x0a\x01u\x12\x09\x0a\x01n\x12\x01s\x1a\x01a"
    )
    assert zds.answer() == b"\x0a\x00"


def test_an_answer_says_why_or_nothing() -> None:
    assert zds.read_answer(zds.answer()) == ""
    assert zds.read_answer(zds.answer("no room")) == "no room"


@pytest.mark.parametrize("data", [b"", b"\xff", b"\x0a\x02\x08", b"\x12\x00"])
def test_what_is_no_answer_is_refused(data: bytes) -> None:
    with pytest.raises(zds.ZdsError):
        zds.read_answer(data)


@pytest.mark.parametrize("data", [b"", b"\xff", b"\x0a\x03\x0a\x01u"])
def test_what_is_no_request_is_refused(data: bytes) -> None:
    with pytest.raises(zds.ZdsError):
        zds.decode(data)


@pytest.mark.parametrize("data", [b"", b"\x08\x02", b"\xff\xff"])
def test_another_version_is_refused(data: bytes) -> None:
    with pytest.raises(zds.ZdsError):
        zds.read_hello(data)


def test_a_message_that_the_proxy_could_not_read_whole_is_not_sent() -> None:
    with pytest.raises(zds.ZdsError):
        zds.encode(zds.Add("u" * 1100, "n", "s", "a"))
