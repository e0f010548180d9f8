"""The client end of an HBONE connection, as scripts."""

from __future__ import annotations

import pytest
from h2.errors import ErrorCodes
from h2.settings import SettingCodes

from meshbpf.agent.core.address import SocketAddress
from meshbpf.agent.core.tuning import Tuning
from meshbpf.agent.wire.errors import UsageError
from meshbpf.agent.wire.events import (
    GoAwayReceived,
    PingAnswered,
    ResponseReceived,
    SendWindowOpened,
    SettingsReceived,
    StreamEnded,
    StreamReset,
)
from meshbpf.agent.wire.hbone import HboneConnection
from meshbpf.agent.wire.headers import connect_request

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
    Reset,
    Settings,
    Window,
)

pytestmark = pytest.mark.compat

MIB = 1024 * 1024
REQUEST = connect_request(
    "198.18.0.2:8080",
    b"k8s.namespace.name=web",
    SocketAddress.parse("198.18.0.1:40000"),
    None,
    b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
)
OK = ((b":status", b"200"), (b"baggage", b"k8s.namespace.name=db"))


@pytest.fixture
def client() -> Playbook:
    """A client past the exchange of settings."""
    return Playbook(HboneConnection(server=False)).opened()


@pytest.fixture
def joined(client: Playbook) -> Playbook:
    """A client with stream 1 answered."""
    assert (
        client
        >> Call("open", REQUEST)
        << Head(1, REQUEST)
        >> Head(1, OK)
        << ResponseReceived(1, 200, OK)
    )
    return client


def test_a_client_opens_with_preface_settings_and_window() -> None:
    assert (
        Playbook(HboneConnection(server=False))
        << Preface()
        << Settings(
            {
                SettingCodes.HEADER_TABLE_SIZE: 4096,
                SettingCodes.ENABLE_PUSH: 0,
                SettingCodes.INITIAL_WINDOW_SIZE: 4 * MIB,
                SettingCodes.MAX_FRAME_SIZE: MIB,
                SettingCodes.ENABLE_CONNECT_PROTOCOL: 0,
                SettingCodes.MAX_HEADER_LIST_SIZE: 16 * 1024,
            }
        )
        << Window(0, 16 * MIB - 65535)
        # A stream may be asked for before the server's settings are here.
        >> Call("open", REQUEST)
        << Head(1, REQUEST)
        >> Settings({SettingCodes.MAX_CONCURRENT_STREAMS: 200, SettingCodes.MAX_FRAME_SIZE: MIB})
        << SettingsReceived(200)
        << Settings(ack=True)
    )


def test_the_windows_are_those_that_were_asked_for() -> None:
    tuning = Tuning(stream_window_bytes=MIB, tunnel_window_bytes=8 * MIB)
    assert (
        Playbook(HboneConnection(server=False, tuning=tuning))
        << Preface()
        << Settings(
            {
                SettingCodes.HEADER_TABLE_SIZE: 4096,
                SettingCodes.ENABLE_PUSH: 0,
                SettingCodes.INITIAL_WINDOW_SIZE: MIB,
                SettingCodes.MAX_FRAME_SIZE: MIB,
                SettingCodes.ENABLE_CONNECT_PROTOCOL: 0,
                SettingCodes.MAX_HEADER_LIST_SIZE: 16 * 1024,
            }
        )
        << Window(0, 8 * MIB - 65535)
    )


def test_a_request_has_the_fields_that_ztunnel_sends() -> None:
    assert REQUEST == (
        (b":method", b"CONNECT"),
        (b":authority", b"198.18.0.2:8080"),
        (b"baggage", b"k8s.namespace.name=web"),
        (b"forwarded", b'for="198.18.0.1:40000"'),
        (b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"),
    )


def test_bytes_pass_and_each_direction_ends_by_itself(joined: Playbook) -> None:
    assert (
        joined
        >> Call("send_data", 1, b"question")
        << Body(1, b"question")
        >> Call("end", 1)
        << Body(1, end=True)
        >> Body(1, b"answer")
        << Got(1, b"answer")
        >> Body(1, b"", end=True)
        << StreamEnded(1)
    )
    assert joined.connection.stream_count == 0


def test_a_refusal_is_reported_with_its_status(client: Playbook) -> None:
    assert (
        client
        >> Call("open", REQUEST)
        << Head(1, REQUEST)
        >> Head(1, ((b":status", b"401"),), end=True)
        << ResponseReceived(1, 401, ((b":status", b"401"),))
        << StreamEnded(1)
        >> Reset(1, ErrorCodes.NO_ERROR)
        << StreamReset(1, ErrorCodes.NO_ERROR, by_peer=True)
    )


def test_bytes_before_the_answer_reset_the_stream(client: Playbook) -> None:
    assert (
        client
        >> Call("open", REQUEST)
        << Head(1, REQUEST)
        >> Body(1, b"early")
        << StreamReset(1, ErrorCodes.PROTOCOL_ERROR, by_peer=False)
        << Reset(1, ErrorCodes.PROTOCOL_ERROR)
    )


@pytest.mark.parametrize("status", [b"", b"20", b"2000", b"abc"])
def test_a_status_that_is_none_resets_the_stream(client: Playbook, status: bytes) -> None:
    assert (
        client
        >> Call("open", REQUEST)
        << Head(1, REQUEST)
        >> Head(1, ((b":status", status),))
        << StreamReset(1, ErrorCodes.PROTOCOL_ERROR, by_peer=False)
        << Reset(1, ErrorCodes.PROTOCOL_ERROR)
    )


def test_interim_answers_are_passed_over(client: Playbook) -> None:
    assert (
        client
        >> Call("open", REQUEST)
        << Head(1, REQUEST)
        >> Head(1, ((b":status", b"103"),))
        >> Head(1, OK)
        << ResponseReceived(1, 200, OK)
    )


def test_goaway_resets_the_streams_that_the_server_never_saw(joined: Playbook) -> None:
    assert (
        joined
        >> Call("open", REQUEST)
        << Head(3, REQUEST)
        >> Away(1, ErrorCodes.NO_ERROR)
        << GoAwayReceived(1, ErrorCodes.NO_ERROR)
        << StreamReset(3, ErrorCodes.REFUSED_STREAM, by_peer=True)
        >> Body(1, b"goes on")
        << Got(1, b"goes on")
    )
    with pytest.raises(UsageError):
        joined.connection.open(REQUEST)


def test_a_reset_is_reported_with_its_code(joined: Playbook) -> None:
    assert (
        joined
        >> Reset(1, ErrorCodes.CONNECT_ERROR)
        << StreamReset(1, ErrorCodes.CONNECT_ERROR, by_peer=True)
        # Calls that cross it on the way do nothing.
        >> Call("end", 1)
        >> Call("reset", 1, ErrorCodes.CANCEL)
        >> Call("credit", 1, 100)
    )


def test_sending_is_bounded_by_both_windows(joined: Playbook) -> None:
    connection = joined.connection
    assert connection.send_budget(1) == 65535
    assert joined >> Window(1, 100_000) << SendWindowOpened(1)
    assert connection.send_budget(1) == 65535  # the connection's
    assert joined >> Window(0, 50_000) << SendWindowOpened(0)
    assert connection.send_budget(1) == 115535
    assert joined >> Call("send_data", 1, bytes(16_000)) << Body(1, bytes(16_000))
    assert connection.send_budget(1) == 99535


def test_a_raised_initial_window_counts_for_open_streams(joined: Playbook) -> None:
    assert (
        joined
        >> Window(0, 16 * MIB)
        << SendWindowOpened(0)
        >> Settings({SettingCodes.INITIAL_WINDOW_SIZE: 4 * MIB})
        << SettingsReceived(2**31 - 1)
        << Settings(ack=True)
    )
    assert joined.connection.send_budget(1) == 4 * MIB


def test_a_raised_initial_window_that_overflows_ends_the_connection(joined: Playbook) -> None:
    assert (
        joined
        >> Window(1, 2**31 - 1 - 65535)
        << SendWindowOpened(1)
        >> Settings({SettingCodes.INITIAL_WINDOW_SIZE: 65536})
        << Fault(ErrorCodes.FLOW_CONTROL_ERROR)
        << Settings(ack=True)
    )


def test_a_ping_of_ours_is_answered(client: Playbook) -> None:
    assert (
        client
        >> Call("ping", b"abcdefgh")
        << Ping(b"abcdefgh")
        >> Ping(b"abcdefgh", ack=True)
        << PingAnswered()
    )


def test_a_server_may_not_open_streams(joined: Playbook) -> None:
    assert joined >> Head(2, OK) << Fault(ErrorCodes.PROTOCOL_ERROR)
