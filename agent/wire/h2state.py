"""The h2 library, cut to the part that it plays here.

It keeps the states of streams and the connection, decodes header blocks,
negotiates SETTINGS and answers PING. It never sees DATA with a payload, nor
WINDOW_UPDATE, nor GOAWAY: its windows would drift from ours, and after a
GOAWAY, even a graceful one, it refuses every further frame.

Streams are forgotten by us when they end (`forget`), not by h2's walk over
all streams whenever one opens; and it remembers the ends of 256 of them,
enough for frames that were on their way, instead of 65,536.
"""

from __future__ import annotations

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import Event as H2Event
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings

from meshbpf.agent.wire.errors import PeerError
from meshbpf.agent.wire.frames import FLAG_END_STREAM, PREFACE, FrameType, header
from meshbpf.agent.wire.hpack_out import LiteralEncoder

STREAM_WINDOW_BYTES = 4 * 1024 * 1024
CONNECTION_WINDOW_BYTES = 16 * 1024 * 1024
MAX_FRAME_BYTES = 1024 * 1024
SERVER_MAX_STREAMS = 200
SERVER_HEADER_LIST_BYTES = 64 * 1024
CLIENT_HEADER_LIST_BYTES = 16 * 1024


class H2State(H2Connection):
    """An H2Connection with our settings, encoder and bookkeeping."""

    MAX_CLOSED_STREAMS = 256

    def __init__(self, *, server: bool) -> None:
        super().__init__(
            H2Configuration(
                client_side=not server,
                # CONNECT without :path and :scheme is malformed to some
                # versions of h2, and what is malformed ends the connection.
                # wire.headers judges a request and answers 400.
                validate_inbound_headers=False,
                normalize_inbound_headers=False,
                # We write nothing that would need it.
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        values: dict[SettingCodes, int] = {
            SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW_BYTES,
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
        self.decoder.max_header_list_size = values[SettingCodes.MAX_HEADER_LIST_SIZE]
        self.encoder = LiteralEncoder()  # type: ignore[assignment]
        if server:
            # The splitter has checked the client's preface; h2 waits for it too.
            self.receive_data(PREFACE)

    @property
    def open_inbound_streams(self) -> int:
        """Always below the limit: we refuse the stream, h2 would end the connection."""
        return 0

    @property
    def open_outbound_streams(self) -> int:
        """Always below the limit: the pool counts them."""
        return 0

    def forget(self, stream_id: int) -> None:
        """Drop a stream that has ended, keeping only how it did."""
        stream = self.streams.pop(stream_id, None)
        if stream is not None:
            self._closed_streams[stream_id] = stream.closed_by

    def feed(self, frame: bytes) -> list[H2Event]:
        """Let h2 act on one whole frame. Raises PeerError."""
        try:
            return self.receive_data(frame)
        except ProtocolError as error:
            # h2 has put a GOAWAY into its buffer; we send our own.
            self.clear_outbound_data_buffer()
            raise PeerError(ErrorCodes(error.error_code), str(error)) from error

    def end_of_data(self, stream_id: int) -> list[H2Event]:
        """Tell h2 that the peer's END_STREAM came. Raises PeerError.

        Straight to the stream: a made-up frame through `feed` would cost as
        much as a header block.
        """
        stream = self.streams.get(stream_id)
        if stream is None:
            return []
        try:
            _frames, events = stream.receive_data(b"", True, 0)
        except ProtocolError as error:
            raise PeerError(ErrorCodes(error.error_code), str(error)) from error
        return events

    def end(self, stream_id: int) -> bytes:
        """Tell h2 that we end the stream; the frame that says so to the peer."""
        stream = self.streams.get(stream_id)
        if stream is not None:
            stream.end_stream()
        return header(0, FrameType.DATA, FLAG_END_STREAM, stream_id)
