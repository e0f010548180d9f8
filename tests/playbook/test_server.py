"""The server end of an HBONE connection, as scripts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hyperframe import frame as hf

from meshbpf.agent.wire.events import (
    GoAwayReceived,
    PingAnswered,
    RequestReceived,
    SendWindowOpened,
    SettingsReceived,
    StreamEnded,
    StreamReset,
)
from meshbpf.agent.wire.frames import HEADER_BLOCK_LIMIT_BYTES
from meshbpf.agent.wire.hbone import EARLY_RESET_LIMIT, HboneConnection
from meshbpf.agent.wire.headers import response

from .tutils import (
    Away,
    Body,
    Call,
    Fault,
    Got,
    Head,
    Ping,
    Playbook,
    Preface,
    Raw,
    Reset,
    Settings,
    Window,
    encode,
)

pytestmark = pytest.mark.compat

MIB = 1024 * 1024
CONNECT = ((b":method", b"CONNECT"), (b":authority", b"198.18.0.2:8080"))
REQUEST = RequestReceived(1, b"CONNECT", b"198.18.0.2:8080", CONNECT, well_formed=True)
NO_LIMIT = 2**31 - 1


@pytest.fixture
def server() -> Playbook:
    """A server past the exchange of settings."""
    return Playbook(HboneConnection(server=True)).opened()


@pytest.fixture
def serving(server: Playbook) -> Playbook:
    """A server with stream 1 answered."""
    assert (
        server
        >> Head(1, CONNECT)
        << REQUEST
        >> Call("respond", 1, response(200, b"k8s.namespace.name=web"), end_stream=False)
        << Head(1, ((b":status", b"200"), (b"baggage", b"k8s.namespace.name=web")))
    )
    return server


def test_a_server_opens_with_settings_and_a_connection_window_of_16_mib() -> None:
    assert (
        Playbook(HboneConnection(server=True))
        << Settings(
            {
                SettingCodes.HEADER_TABLE_SIZE: 4096,
                SettingCodes.ENABLE_PUSH: 0,
                SettingCodes.INITIAL_WINDOW_SIZE: 4 * MIB,
                SettingCodes.MAX_FRAME_SIZE: MIB,
                SettingCodes.ENABLE_CONNECT_PROTOCOL: 0,
                SettingCodes.MAX_CONCURRENT_STREAMS: 200,
                SettingCodes.MAX_HEADER_LIST_SIZE: 64 * 1024,
            }
        )
        << Window(0, 16 * MIB - 65535)
        >> Preface()
        >> Settings({SettingCodes.MAX_CONCURRENT_STREAMS: 7})
        << SettingsReceived(7)
        << Settings(ack=True)
    )


def test_bytes_pass_and_each_direction_ends_by_itself(serving: Playbook) -> None:
    assert (
        serving
        >> Body(1, b"hello")
        << Got(1, b"hello")
        >> Body(1, end=True)
        << StreamEnded(1)
        >> Call("send_data", 1, b"still here")
        << Body(1, b"still here")
        >> Call("end", 1)
        << Body(1, end=True)
    )
    assert serving.connection.stream_count == 0


def test_a_refusal_also_tells_the_client_to_stop_sending(server: Playbook) -> None:
    assert (
        server
        >> Head(1, CONNECT)
        << REQUEST
        >> Call("respond", 1, response(401), end_stream=True)
        << Head(1, ((b":status", b"401"),), end=True)
        << Reset(1, ErrorCodes.NO_ERROR)
        # What the client had sent already is swallowed.
        >> Body(1, b"too late")
    )


@pytest.mark.parametrize(
    "fields",
    [
        (*CONNECT, (b":path", b"/")),
        (*CONNECT, (b":scheme", b"https")),
        (CONNECT[0],),
        (*CONNECT, CONNECT[1]),
        (CONNECT[0], (b"baggage", b""), CONNECT[1]),
        (*CONNECT, (b"Forwarded", b"x")),
        (*CONNECT, (b"connection", b"close")),
        (*CONNECT, (b"content-length", b"5")),
    ],
)
def test_a_malformed_connect_costs_its_stream_and_not_the_tunnel(
    server: Playbook, fields: tuple[tuple[bytes, bytes], ...]
) -> None:
    authority = dict(fields).get(b":authority", b"")
    assert (
        server
        >> Head(1, fields)
        << RequestReceived(1, b"CONNECT", authority, fields, well_formed=False)
        >> Call("respond", 1, response(400), end_stream=True)
        << Head(1, ((b":status", b"400"),), end=True)
        << Reset(1, ErrorCodes.NO_ERROR)
        >> Head(3, CONNECT)
        << RequestReceived(3, b"CONNECT", b"198.18.0.2:8080", CONNECT, well_formed=True)
    )


def test_another_method_is_reported_with_its_name(server: Playbook) -> None:
    get = (
        (b":method", b"GET"),
        (b":scheme", b"https"),
        (b":path", b"/"),
        (b":authority", b"x:1"),
    )
    assert server >> Head(1, get) << RequestReceived(1, b"GET", b"x:1", get, well_formed=True)


def test_padding_is_credited_by_itself_and_not_delivered(serving: Playbook) -> None:
    # 256 bytes of each frame are padding: the pad length and what it counts.
    for _ in range(MIB // 256 - 1):
        assert serving >> Body(1, b"", padding=255)
    assert serving >> Body(1, b"ab", padding=255) << Got(1, b"ab") << Window(1, MIB)


def test_credit_is_announced_in_quarters_of_a_window(serving: Playbook) -> None:
    assert (
        serving
        >> Body(1, bytes(MIB))
        << Got(1, bytes(MIB))
        >> Call("credit", 1, MIB - 1)
        >> Call("credit", 1, 1)
        << Window(1, MIB)
        >> Call("credit", 1, 3 * MIB)
        << Window(0, 4 * MIB)
        << Window(1, 3 * MIB)
    )


def test_data_beyond_the_stream_window_resets_the_stream(serving: Playbook) -> None:
    for _ in range(4):
        assert serving >> Body(1, bytes(MIB)) << Got(1, bytes(MIB))
    assert (
        serving
        >> Body(1, b"x")
        << StreamReset(1, ErrorCodes.FLOW_CONTROL_ERROR, by_peer=False)
        << Reset(1, ErrorCodes.FLOW_CONTROL_ERROR)
    )


def test_data_beyond_the_connection_window_ends_the_connection(server: Playbook) -> None:
    for stream_id in (1, 3, 5, 7):
        server >> Head(stream_id, CONNECT)
        assert server << RequestReceived(
            stream_id, b"CONNECT", b"198.18.0.2:8080", CONNECT, well_formed=True
        )
        for _ in range(4):
            assert server >> Body(stream_id, bytes(MIB)) << Got(stream_id, bytes(MIB))
    server >> Head(9, CONNECT)
    server << RequestReceived(9, b"CONNECT", b"198.18.0.2:8080", CONNECT, well_formed=True)
    assert server >> Body(9, b"x") << Fault(ErrorCodes.FLOW_CONTROL_ERROR)


def test_the_windows_stay_whole_when_a_stream_goes_with_bytes_unread(serving: Playbook) -> None:
    assert (
        serving
        >> Body(1, bytes(MIB))
        << Got(1, bytes(MIB))
        >> Call("reset", 1, ErrorCodes.CANCEL)
        << Reset(1, ErrorCodes.CANCEL)
        >> Body(1, bytes(MIB))
        >> Body(1, bytes(MIB))
        >> Call("credit", 1, MIB)
        >> Body(1, bytes(MIB))
        << Window(0, 4 * MIB)
    )


def test_data_after_the_end_of_a_stream_resets_it(serving: Playbook) -> None:
    assert (
        serving
        >> Body(1, end=True)
        << StreamEnded(1)
        >> Body(1, b"more")
        << StreamReset(1, ErrorCodes.STREAM_CLOSED, by_peer=False)
        << Reset(1, ErrorCodes.STREAM_CLOSED)
    )


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (Body(9, b"x"), ErrorCodes.PROTOCOL_ERROR),
        (Window(9, 1), ErrorCodes.PROTOCOL_ERROR),
        (Raw(b"\x00\x00\x01\x00\x00\x00\x00\x00\x00x"), ErrorCodes.PROTOCOL_ERROR),
        (Raw(b"\x00\x00\x00\x08\x00\x00\x00\x00\x00"), ErrorCodes.FRAME_SIZE_ERROR),
        (Raw(b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x00\x00"), ErrorCodes.PROTOCOL_ERROR),
        (Raw(b"\x10\x00\x01\x00\x00\x00\x00\x00\x01"), ErrorCodes.FRAME_SIZE_ERROR),
        (Raw(b"\x00\x00\x00\x09\x04\x00\x00\x00\x01"), ErrorCodes.PROTOCOL_ERROR),
        (Raw(b"\x00\x00\x02\x00\x08\x00\x00\x00\x01\x02x"), ErrorCodes.PROTOCOL_ERROR),
        (Raw(b"\x00\x00\x00\x00\x08\x00\x00\x00\x01"), ErrorCodes.FRAME_SIZE_ERROR),
        (Window(0, NO_LIMIT), ErrorCodes.FLOW_CONTROL_ERROR),
        (Raw(b"\x00\x00\x08\x07\x00\x00\x00\x00\x01" + bytes(8)), ErrorCodes.PROTOCOL_ERROR),
        (Settings({SettingCodes.INITIAL_WINDOW_SIZE: 2**31}), ErrorCodes.FLOW_CONTROL_ERROR),
        (Raw(b"\x00\x00\x01\x01\x04\x00\x00\x00\x03\xff"), ErrorCodes.PROTOCOL_ERROR),
    ],
    ids=[
        "data-on-an-idle-stream",
        "window-of-an-idle-stream",
        "data-on-stream-0",
        "window-update-too-short",
        "window-update-by-0",
        "frame-above-1-mib",
        "continuation-alone",
        "padding-longer-than-the-frame",
        "padded-and-empty",
        "connection-window-overflow",
        "goaway-of-a-stream",
        "initial-window-overflow",
        "hpack-garbage",
    ],
)
def test_a_broken_rule_ends_the_connection_with_its_code(
    serving: Playbook, frame: object, code: ErrorCodes
) -> None:
    assert serving >> frame << Fault(code)


def test_the_first_frame_must_be_settings() -> None:
    fresh = Playbook(HboneConnection(server=True))
    fresh.connection.start()
    fresh.connection.out.clear()
    fresh._start = False
    assert fresh >> Preface() >> Ping(bytes(8)) << Fault(ErrorCodes.PROTOCOL_ERROR)


def test_http_1_is_recognised_as_not_http_2() -> None:
    fresh = Playbook(HboneConnection(server=True))
    fresh.connection.start()
    fresh.connection.out.clear()
    fresh._start = False
    assert fresh >> Raw(b"GET / HTTP/1.1\r\n\r\n") << Fault(ErrorCodes.PROTOCOL_ERROR)


def test_nothing_may_come_between_the_frames_of_a_header_block(server: Playbook) -> None:
    begun = hf.HeadersFrame(1, b"\x83").serialize()  # without END_HEADERS
    assert server >> Raw(begun) >> Body(1, b"x") << Fault(ErrorCodes.PROTOCOL_ERROR)


def test_a_header_block_without_end_is_cut_off(server: Playbook) -> None:
    server >> Raw(hf.HeadersFrame(1, b"\x00").serialize())
    for _ in range(HEADER_BLOCK_LIMIT_BYTES // 8192 - 1):
        server >> Raw(hf.ContinuationFrame(1, bytes(8192)).serialize())
    assert (
        server
        >> Raw(hf.ContinuationFrame(1, bytes(8192)).serialize())
        << Fault(ErrorCodes.ENHANCE_YOUR_CALM)
    )


def test_empty_continuations_are_cut_off_too(server: Playbook) -> None:
    server >> Raw(hf.HeadersFrame(1, b"\x00").serialize())
    for _ in range(63):
        server >> Raw(hf.ContinuationFrame(1, b"").serialize())
    assert (
        server >> Raw(hf.ContinuationFrame(1, b"").serialize()) << Fault(ErrorCodes.PROTOCOL_ERROR)
    )


def test_a_header_list_above_64_kib_ends_the_connection(server: Playbook) -> None:
    # 2 bytes a field on the wire, 40 in the list: a compression bomb.
    first = b"\x00\x02aa\x02bb" + b"\x40\x04name" + b"\x04aaaa" + b"\xbe" * 3000
    block = hf.HeadersFrame(1, first, flags=["END_HEADERS"]).serialize()
    assert server >> Raw(block) << Fault(ErrorCodes.ENHANCE_YOUR_CALM)


def test_the_201st_stream_is_refused_and_the_others_live(server: Playbook) -> None:
    for index in range(200):
        stream_id = 2 * index + 1
        server >> Head(stream_id, CONNECT)
        server << RequestReceived(
            stream_id, b"CONNECT", b"198.18.0.2:8080", CONNECT, well_formed=True
        )
    assert (
        server
        >> Head(401, CONNECT)
        << Reset(401, ErrorCodes.REFUSED_STREAM)
        >> Body(1, b"alive")
        << Got(1, b"alive")
    )


def test_streams_opened_and_dropped_without_end_are_cut_off(server: Playbook) -> None:
    for index in range(EARLY_RESET_LIMIT):
        stream_id = 2 * index + 1
        server >> Head(stream_id, CONNECT)
        server << RequestReceived(
            stream_id, b"CONNECT", b"198.18.0.2:8080", CONNECT, well_formed=True
        )
        server >> Reset(stream_id, ErrorCodes.CANCEL)
        server << StreamReset(stream_id, ErrorCodes.CANCEL, by_peer=True)
    assert server
    last = 2 * EARLY_RESET_LIMIT + 1
    assert (
        server
        >> Head(last, CONNECT)
        << RequestReceived(last, b"CONNECT", b"198.18.0.2:8080", CONNECT, well_formed=True)
        >> Reset(last, ErrorCodes.CANCEL)
        << Fault(ErrorCodes.ENHANCE_YOUR_CALM)
    )


def test_a_stream_window_that_overflows_resets_the_stream(serving: Playbook) -> None:
    assert (
        serving
        >> Window(1, NO_LIMIT)
        << StreamReset(1, ErrorCodes.FLOW_CONTROL_ERROR, by_peer=False)
        << Reset(1, ErrorCodes.FLOW_CONTROL_ERROR)
    )


def test_a_lowered_initial_window_takes_back_what_was_given(serving: Playbook) -> None:
    connection = serving.connection
    assert serving >> Window(0, MIB) << SendWindowOpened(0)
    assert connection.send_budget(1) == 65535
    assert serving >> Call("send_data", 1, bytes(10_000)) << Body(1, bytes(10_000))
    assert (
        serving
        >> Settings({SettingCodes.INITIAL_WINDOW_SIZE: 5_000})
        << SettingsReceived(NO_LIMIT)
        << Settings(ack=True)
    )
    assert connection.send_budget(1) == -5_000
    assert serving >> Window(1, 6_000) << SendWindowOpened(1)
    assert connection.send_budget(1) == 1_000


def test_ping_is_answered(server: Playbook) -> None:
    assert server >> Ping(b"12345678") << Ping(b"12345678", ack=True)


def test_a_client_that_goes_away_may_finish_its_streams(serving: Playbook) -> None:
    assert (
        serving
        >> Away(0, ErrorCodes.NO_ERROR)
        << GoAwayReceived(0, ErrorCodes.NO_ERROR)
        >> Body(1, b"last words", end=True)
        << Got(1, b"last words")
        << StreamEnded(1)
        >> Call("send_data", 1, b"bye")
        << Body(1, b"bye")
    )


def test_our_goaway_refuses_new_streams_only(serving: Playbook) -> None:
    assert (
        serving
        >> Call("go_away", ErrorCodes.NO_ERROR)
        << Away(1, ErrorCodes.NO_ERROR)
        >> Head(3, CONNECT)
        << Reset(3, ErrorCodes.REFUSED_STREAM)
        >> Body(1, b"goes on")
        << Got(1, b"goes on")
    )


@pytest.mark.compat
def test_winding_down_refuses_no_stream_that_was_on_its_way(serving: Playbook) -> None:
    """RFC 9113, 6.8: the highest id, then, once the client has read it, the true one."""
    assert (
        serving
        >> Call("wind_down", b"lastping")
        << Away(2**31 - 1, ErrorCodes.NO_ERROR)
        << Ping(b"lastping")
        >> Head(3, CONNECT)
        << replace(REQUEST, stream_id=3)
        >> Ping(b"another1", ack=True)
        << PingAnswered()
        >> Head(5, CONNECT)
        << replace(REQUEST, stream_id=5)
        >> Ping(b"lastping", ack=True)
        << PingAnswered()
        << Away(5, ErrorCodes.NO_ERROR)
        >> Head(7, CONNECT)
        << Reset(7, ErrorCodes.REFUSED_STREAM)
        >> Body(1, b"goes on")
        << Got(1, b"goes on")
    )


def test_data_on_a_stream_that_the_peer_had_reset_is_told_once(serving: Playbook) -> None:
    assert (
        serving
        >> Reset(1, ErrorCodes.CANCEL)
        << StreamReset(1, ErrorCodes.CANCEL, by_peer=True)
        >> Body(1, b"still here")
        << Reset(1, ErrorCodes.STREAM_CLOSED)
        >> Body(1, b"and here")
    )


def test_unknown_frames_are_skipped_whole(serving: Playbook) -> None:
    unknown = b"\x00\x10\x00\x42\xff\x00\x00\x00\x01" + bytes(0x1000)
    assert serving >> Raw(unknown) >> Body(1, b"x") << Got(1, b"x")


def test_ten_thousand_streams_leave_nothing_behind(server: Playbook) -> None:
    connection, encoder = server.connection, server.peer_encoder
    for stream_id in range(1, 20_000, 2):
        connection.receive(memoryview(encode(Head(stream_id, CONNECT), encoder)))
        connection.respond(stream_id, response(200), end_stream=False)
        connection.receive(memoryview(encode(Body(stream_id, b"x", end=True), encoder)))
        connection.credit(stream_id, 1)
        connection.end(stream_id)
        connection.out.clear()
    assert connection.stream_count == 0
    assert len(connection._h2.streams) == 0
    assert len(connection._cut) <= 256
