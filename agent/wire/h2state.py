"""The h2 library, cut to the part that it plays here: SETTINGS and PING.

It negotiates the settings of both sides, acknowledges them and answers PING.
Streams it never hears of: its own state machine and header validation cost a
connection more than TLS does, and hold a stream's bytes against windows that
are not ours. hbone.py has what a tunnel needs of them.
"""

from __future__ import annotations

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import Event as H2Event
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings

from meshbpf.agent.wire.errors import PeerError
from meshbpf.agent.wire.frames import PREFACE
from meshbpf.agent.wire.hpack_in import HeaderDecoder

MAX_FRAME_BYTES = 1024 * 1024
SERVER_MAX_STREAMS = 200
SERVER_HEADER_LIST_BYTES = 64 * 1024
CLIENT_HEADER_LIST_BYTES = 16 * 1024


class H2State(H2Connection):
    """An H2Connection with our settings."""

    def __init__(self, *, server: bool, stream_window_bytes: int) -> None:
        super().__init__(H2Configuration(client_side=not server))
        values: dict[SettingCodes, int] = {
            SettingCodes.INITIAL_WINDOW_SIZE: stream_window_bytes,
            SettingCodes.MAX_FRAME_SIZE: MAX_FRAME_BYTES,
            SettingCodes.ENABLE_PUSH: 0,
        }
        if server:
            values[SettingCodes.MAX_CONCURRENT_STREAMS] = SERVER_MAX_STREAMS
            values[SettingCodes.MAX_HEADER_LIST_SIZE] = SERVER_HEADER_LIST_BYTES
        else:
            values[SettingCodes.MAX_HEADER_LIST_SIZE] = CLIENT_HEADER_LIST_BYTES
        self.local_settings = Settings(client=not server, initial_values=values)
        # These hold from the first byte, also for a peer that has not yet
        # seen our SETTINGS.
        self.max_inbound_frame_size = MAX_FRAME_BYTES
        # The table of the peer's encoder has the size that h2 negotiates.
        self.headers = HeaderDecoder(
            self.decoder, max_list_bytes=values[SettingCodes.MAX_HEADER_LIST_SIZE]
        )
        if server:
            # The splitter has checked the client's preface; h2 waits for it too.
            self.receive_data(PREFACE)

    def feed(self, frame: bytes) -> list[H2Event]:
        """Let h2 act on one whole frame. Raises PeerError."""
        try:
            return self.receive_data(frame)
        except ProtocolError as error:
            # h2 has put a GOAWAY into its buffer; we send our own.
            self.clear_outbound_data_buffer()
            raise PeerError(ErrorCodes(error.error_code), str(error)) from error
