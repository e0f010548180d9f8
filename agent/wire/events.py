"""What an HBONE connection reports after it was given received bytes.

The driver feeds bytes and acts on these in order. Views in `DataReceived`
point into the driver's own buffer and are dead once it is used again.
"""

from __future__ import annotations

from dataclasses import dataclass

from h2.errors import ErrorCodes

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class RequestReceived:
    """A peer wants a stream. `well_formed` False means: answer 400."""

    stream_id: int
    method: bytes
    authority: bytes
    headers: Headers
    well_formed: bool


@dataclass(frozen=True, slots=True)
class ResponseReceived:
    """The answer to a stream of ours; only 200 opens it."""

    stream_id: int
    status: int
    headers: Headers


@dataclass(frozen=True, slots=True)
class DataReceived:
    """Payload of one stream, in order. `size` is the sum of the views' lengths.

    The peer may send as much again only after `HboneConnection.credit`.
    """

    stream_id: int
    views: list[memoryview]
    size: int


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """The peer sends no more on this stream; we still may."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class StreamReset:
    """The stream is gone in both directions."""

    stream_id: int
    error_code: int
    by_peer: bool


@dataclass(frozen=True, slots=True)
class SendWindowOpened:
    """More may be sent: on one stream, or on all of them when `stream_id` is 0."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class SettingsReceived:
    """The peer's settings are in force."""

    max_streams: int


@dataclass(frozen=True, slots=True)
class PingAnswered:
    """The peer lives."""


@dataclass(frozen=True, slots=True)
class GoAwayReceived:
    """No new streams here. Streams above `last_stream_id` were not looked at: they are reset."""

    last_stream_id: int
    error_code: int


Event = (
    RequestReceived
    | ResponseReceived
    | DataReceived
    | StreamEnded
    | StreamReset
    | SendWindowOpened
    | SettingsReceived
    | PingAnswered
    | GoAwayReceived
)

__all__ = [
    "DataReceived",
    "ErrorCodes",
    "Event",
    "GoAwayReceived",
    "Headers",
    "PingAnswered",
    "RequestReceived",
    "ResponseReceived",
    "SendWindowOpened",
    "SettingsReceived",
    "StreamEnded",
    "StreamReset",
]
