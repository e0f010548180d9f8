"""A gRPC client, just big enough: unary calls on one connection from within a pod."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import h2.config
import h2.connection
import h2.events

from tests.progs.pod import Pod
from tests.waypoint.bed import inside_connect


@dataclass(frozen=True)
class Called:
    """One answer: HTTP status, gRPC status, and what the backend has said."""

    http: int
    grpc: int
    data: bytes

    @property
    def said(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.data[5:])
        return found


class Grpc:
    """A connection."""

    def __init__(self, pod: Pod, address: str, port: int) -> None:
        self._sock = inside_connect(pod.netns, address, port)
        config = h2.config.H2Configuration(header_encoding="utf-8")
        self._h2 = h2.connection.H2Connection(config)
        self._h2.initiate_connection()
        self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def call(
        self, path: str, headers: Mapping[str, str] | None = None, message: bytes = b""
    ) -> Called:
        """POST one message of at most 16 KiB, all at once; wait for the trailers."""
        stream = self._h2.get_next_available_stream_id()
        head = [
            (":method", "POST"),
            (":scheme", "http"),
            (":authority", "echo"),
            (":path", path),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
            *(headers or {}).items(),
        ]
        self._h2.send_headers(stream, head)
        framed = b"\0" + struct.pack(">I", len(message)) + message
        self._h2.send_data(stream, framed, end_stream=True)
        self._flush()
        seen: dict[str, str] = {}
        data = b""
        while True:
            received = self._sock.recv(65536)
            assert received, "the connection ended"
            for event in self._h2.receive_data(received):
                match event:
                    case h2.events.ResponseReceived() | h2.events.TrailersReceived():
                        seen.update((str(n), str(v)) for n, v in event.headers or [])
                    case h2.events.DataReceived():
                        data += event.data or b""
                        size = event.flow_controlled_length or 0
                        self._h2.acknowledge_received_data(size, stream)
                    case h2.events.StreamReset():
                        raise AssertionError(f"reset: {event.error_code}")
                    case h2.events.StreamEnded():
                        self._flush()
                        return Called(int(seen[":status"]), int(seen["grpc-status"]), data)
            self._flush()

    def _flush(self) -> None:
        data = self._h2.data_to_send()
        if data:
            self._sock.sendall(data)
