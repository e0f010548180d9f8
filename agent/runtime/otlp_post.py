"""One HTTP POST to an OpenTelemetry collector, from the agent's own network namespace.

A connection for each: a batch comes once a second, and a connection that is
kept would die unnoticed with the collector. TLS by the system's roots.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import Any

import h11
import trio

import meshbpf
from meshbpf.agent.config import OtlpEndpoint
from meshbpf.agent.core.errors import MeshbpfError

MAX_ANSWER_BYTES = 64 * 1024
_READ_BYTES = 16 * 1024


class CollectorError(MeshbpfError):
    """A collector cannot be reached, or does not answer in HTTP."""

    def __init__(self, what: str) -> None:
        super().__init__("no-collector", what, "does `curl -v` reach it from the agent's host?")


@dataclass(frozen=True, slots=True)
class Posted:
    """What a collector said."""

    status: int
    body: bytes


class Collector:
    """Where batches are sent."""

    def __init__(self, endpoint: OtlpEndpoint, timeout_s: float) -> None:
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._tls = ssl.create_default_context() if endpoint.tls else None

    def __str__(self) -> str:
        return self._endpoint.authority

    async def post(self, path: str, body: bytes) -> Posted:
        """Send `body`, connect and answer within the timeout. Raises CollectorError."""
        try:
            with trio.fail_after(self._timeout_s):
                stream = await self._connect()
                try:
                    return await _exchange(stream, self._request(path, body), body)
                finally:
                    # Without TLS's farewell: the answer is all that was wanted.
                    await trio.aclose_forcefully(stream)
        except trio.TooSlowError as error:
            raise CollectorError(f"{self}: no answer in {self._timeout_s:g} s") from error
        except (OSError, trio.BrokenResourceError, h11.ProtocolError) as error:
            raise CollectorError(f"{self}: {_cause(error)}") from error

    async def _connect(self) -> trio.abc.Stream:
        endpoint = self._endpoint
        if self._tls is None:
            return await trio.open_tcp_stream(endpoint.host, endpoint.port)
        return await trio.open_ssl_over_tcp_stream(
            endpoint.host, endpoint.port, ssl_context=self._tls, https_compatible=True
        )

    def _request(self, path: str, body: bytes) -> h11.Request:
        fields = [
            ("Host", self._endpoint.authority),
            ("Content-Type", "application/x-protobuf"),
            ("Content-Length", str(len(body))),
            ("User-Agent", f"meshbpf/{meshbpf.__version__}"),
            ("Connection", "close"),
        ]
        return h11.Request(method="POST", target=self._endpoint.path + path, headers=fields)


def _cause(error: BaseException) -> BaseException:
    """What trio's errors come from says more than they do; of several attempts the first."""
    found = error.__cause__ or error
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


async def _exchange(stream: trio.abc.Stream, request: h11.Request, body: bytes) -> Posted:
    link = h11.Connection(h11.CLIENT)
    parts = (request, h11.Data(data=body), h11.EndOfMessage())
    await stream.send_all(b"".join(link.send(part) or b"" for part in parts))
    head: h11.Response | None = None
    answer = bytearray()
    while True:
        event: Any = link.next_event()
        if event is h11.NEED_DATA:
            link.receive_data(bytes(await stream.receive_some(_READ_BYTES)))
        elif isinstance(event, h11.Response):
            head = event
        elif isinstance(event, h11.Data):
            answer += event.data
            if len(answer) > MAX_ANSWER_BYTES:
                raise h11.RemoteProtocolError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
        elif head is not None:
            return Posted(head.status_code, bytes(answer))
        elif not isinstance(event, h11.InformationalResponse):
            raise h11.RemoteProtocolError("it hung up")
