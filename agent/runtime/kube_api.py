"""HTTP with the API server: one request a connection, h11 over TLS.

Lists and watches are few and long, patches are rare: a pool of connections
would save nothing that anybody sees. Bounds: an answer of MAX_BODY_BYTES, a
watch's line of MAX_LINE_BYTES, REQUEST_S for whatever is not a watch.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any
from urllib.parse import urlencode

import h11
import msgspec
import trio

import meshbpf
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.runtime.certs import utc_now
from meshbpf.agent.runtime.kube_config import KubeConfig
from meshbpf.agent.runtime.kube_credentials import Credentials

CONNECT_S = 10.0
REQUEST_S = 30.0
MAX_BODY_BYTES = 256 * 1024 * 1024
MAX_LINE_BYTES = 8 * 1024 * 1024
"""etcd takes objects of 1.5 MiB; as JSON they are larger."""
_READ_BYTES = 64 * 1024


class KubeError(MeshbpfError):
    """The API server cannot be asked, or says no; `status` is HTTP's, 0 for the first."""

    def __init__(self, code: str, what: str, status: int = 0) -> None:
        super().__init__(code, what, "`kubectl get --raw /readyz` with the same kubeconfig")
        self.status = status


class _Status(msgspec.Struct):
    message: str = ""
    code: int = 0


class Answer:
    """An answer whose body is still to come; iterated over, it gives the lines of a watch.

    Not by async generators: one that is left before its end would be finished
    by the garbage collector, outside of any task.
    """

    def __init__(
        self, status: int, link: h11.Connection, stream: trio.SSLStream[trio.SocketStream]
    ) -> None:
        self.status = status
        self._link = link
        self._stream = stream
        self._lines: list[bytes] = []
        self._rest = bytearray()

    async def whole(self) -> bytes:
        """All of the body."""
        found = bytearray()
        while part := await self._part():
            found += part
            if len(found) > MAX_BODY_BYTES:
                raise KubeError("answer-too-long", f"an answer of more than {MAX_BODY_BYTES} bytes")
        return bytes(found)

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> bytes:
        """The next line; one that is cut short by the end is not handed out."""
        while not self._lines:
            part = await self._part()
            if not part:
                raise StopAsyncIteration
            self._rest += part
            *whole, last = self._rest.split(b"\n")
            self._lines = [bytes(line) for line in reversed(whole) if line]
            self._rest = bytearray(last)
            if len(self._rest) > MAX_LINE_BYTES:
                raise KubeError("answer-too-long", f"an event of more than {MAX_LINE_BYTES} bytes")
        return self._lines.pop()

    async def _part(self) -> bytes:
        event = await _next(self._link, self._stream)
        return bytes(event.data) if isinstance(event, h11.Data) else b""


class KubeApi:
    """Requests to one API server."""

    def __init__(self, config: KubeConfig, *, now: Callable[[], datetime] = utc_now) -> None:
        self._config = config
        self._credentials = Credentials(config, now)
        self._context = _context(config)

    @property
    def origin(self) -> str:
        """The server, for people."""
        return self._config.origin

    async def get(self, path: str, **query: str) -> bytes:
        """The body of an object or a list. Raises KubeError."""
        return await self._short("GET", path, query, b"", "")

    async def create(self, path: str, body: dict[str, Any]) -> bytes:
        """Make an object in a collection; as the server has it then. Raises KubeError."""
        data = msgspec.json.encode(body)
        return await self._short("POST", path, {}, data, "application/json")

    async def replace(self, path: str, body: dict[str, Any]) -> bytes:
        """Put an object in the place of the one whose resourceVersion it bears.

        As the server has it then. Raises KubeError, status 409 when that is not the newest.
        """
        data = msgspec.json.encode(body)
        return await self._short("PUT", path, {}, data, "application/json")

    async def apply(self, path: str, body: dict[str, Any], manager: str) -> bytes:
        """Server-side apply: `manager` wants these fields so, whoever has them now.

        As the server has the object then. Raises KubeError.
        """
        query = {"fieldManager": manager, "force": "true"}
        data = msgspec.json.encode(body)
        return await self._short("PATCH", path, query, data, "application/apply-patch+yaml")

    async def delete(self, path: str) -> None:
        """Delete an object. Raises KubeError."""
        await self._short("DELETE", path, {}, b"", "")

    async def patch_status(self, path: str, change: dict[str, Any]) -> None:
        """Merge `change` into an object by its status subresource. Raises KubeError.

        Metadata can be changed there too, with fewer rights than at the object.
        """
        body = msgspec.json.encode(change)
        kind = "application/merge-patch+json"
        await self._short("PATCH", f"{path}/status", {}, body, kind)

    @asynccontextmanager
    async def watch(self, path: str, **query: str) -> AsyncIterator[Answer]:
        """The stream of events of a list. Raises KubeError, from the block too."""
        async with self._request("GET", path, query | {"watch": "true"}, b"", "") as answer:
            yield answer

    async def _short(
        self, method: str, path: str, query: dict[str, str], body: bytes, kind: str
    ) -> bytes:
        with trio.move_on_after(REQUEST_S):
            async with self._request(method, path, query, body, kind) as answer:
                return await answer.whole()
        raise KubeError("timeout", f"{self.origin}{path}: no answer in {REQUEST_S:g} s")

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, query: dict[str, str], body: bytes, kind: str
    ) -> AsyncIterator[Answer]:
        config = self._config
        target = f"{config.path}{path}" + (f"?{urlencode(query)}" if query else "")
        headers = [
            ("Host", f"{config.host}:{config.port}"),
            ("Accept", "application/json"),
            ("User-Agent", f"meshbpf/{meshbpf.__version__}"),
            ("Connection", "close"),
        ]
        token = await self._credentials.token()
        if token:
            headers.append(("Authorization", f"Bearer {token}"))
        if kind:
            headers += [("Content-Type", kind), ("Content-Length", str(len(body)))]
        stream = await self._connect()
        async with stream:
            link = h11.Connection(h11.CLIENT)
            try:
                data = link.send(h11.Request(method=method, target=target, headers=headers)) or b""
                data += (link.send(h11.Data(data=body)) or b"") if body else b""
                await stream.send_all(data + (link.send(h11.EndOfMessage()) or b""))
                head = await _next(link, stream)
                if not isinstance(head, h11.Response):
                    raise KubeError("no-answer", f"{self.origin}{path}: the server hung up")
                answer = Answer(head.status_code, link, stream)
                if head.status_code >= 300:
                    raise await self._refusal(path, answer)
                yield answer
            except (trio.BrokenResourceError, ssl.SSLError, h11.ProtocolError) as error:
                raise KubeError("cut-off", f"{self.origin}{path}: {_cause(error)}") from error

    async def _refusal(self, path: str, answer: Answer) -> KubeError:
        if answer.status == 401:
            self._credentials.refused()
        try:
            said = msgspec.json.decode(await answer.whole(), type=_Status).message
        except msgspec.DecodeError:
            said = ""
        what = f"{self.origin}{path}: {answer.status} {said}".rstrip()
        return KubeError("refused", what, answer.status)

    async def _connect(self) -> trio.SSLStream[trio.SocketStream]:
        config = self._config
        try:
            with trio.fail_after(CONNECT_S):
                plain = await trio.open_tcp_stream(config.host, config.port)
                stream = trio.SSLStream(
                    plain, self._context, server_hostname=config.server_name, https_compatible=True
                )
                try:
                    await stream.do_handshake()
                except BaseException:
                    await trio.aclose_forcefully(plain)
                    raise
                return stream
        except (OSError, trio.BrokenResourceError, trio.TooSlowError) as error:
            raise KubeError("unreachable", f"{self.origin}: {_cause(error)}") from error


async def _next(link: h11.Connection, stream: trio.SSLStream[trio.SocketStream]) -> Any:
    while (event := link.next_event()) is h11.NEED_DATA:
        link.receive_data(bytes(await stream.receive_some(_READ_BYTES)))
    return event


def _cause(error: BaseException) -> str:
    """Trio's errors say little themselves, and what they were caused by says it."""
    if isinstance(error, trio.TooSlowError):
        return f"no connection in {CONNECT_S:g} s"
    return str(error.__cause__ or error)


def _context(config: KubeConfig) -> ssl.SSLContext:
    """TLS as the configuration has it. Raises KubeError for certificates that are none."""
    try:
        context = ssl.create_default_context(cadata=config.ca.decode() if config.ca else None)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if config.client_cert:
            # The ssl module reads keys from files alone: one that has no name serves.
            fd = os.memfd_create("kube-client", os.MFD_CLOEXEC)
            with os.fdopen(fd, "wb") as file:
                file.write(config.client_cert + b"\n" + config.client_key)
                file.flush()
                context.load_cert_chain(f"/proc/self/fd/{fd}")
    except (ssl.SSLError, ValueError) as error:
        raise KubeError("bad-certificate", f"kubeconfig for {config.origin}: {error}") from error
    return context
