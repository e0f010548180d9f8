"""HTTP/2 on port 15008 as a hostile client with a valid certificate uses it.

The frames are made with hyperframe and hpack. Each case states its outcome,
and that a connection of somebody else goes on meanwhile. The rules of the
protocol itself are held by tests/playbook; here it is whole agents.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hpack import Decoder, Encoder
from hyperframe import frame as hf

from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.tuning import ZTUNNELS
from meshbpf.agent.runtime.handshake import shake_hands
from meshbpf.agent.runtime.sockets import prepare
from meshbpf.agent.wire.errors import TlsError
from meshbpf.agent.wire.frames import PREFACE
from meshbpf.agent.wire.hbone import CONTROL_FRAME_LIMIT
from meshbpf.agent.wire.tls import Expectation
from meshbpf.agent.wire.tls_channel import TlsChannel
from tests.unit.forwarder.rig import CLIENT, DB, SERVER, WEB, Rig, dial
from tests.unit.forwarder.test_tls_misuse import bystander

pytestmark = [pytest.mark.root, pytest.mark.compat]

PORT = 9191
"""The attacker's; the bystander has the usual one."""
CONNECT = [(b":method", b"CONNECT"), (b":authority", f"{SERVER}:{PORT}".encode())]


class Attacker:
    """One tunnel by hand: TLS is right, what is in it is up to the test."""

    def __init__(
        self, stream: trio.SocketStream, channel: TlsChannel, app: trio.SocketListener
    ) -> None:
        self.app = app
        self._stream = stream
        self._channel = channel
        self._received = b""
        self._ended = False
        self.encoder, self.decoder = Encoder(), Decoder()

    async def send(self, *frames: hf.Frame | bytes) -> None:
        data = b"".join(each if isinstance(each, bytes) else each.serialize() for each in frames)
        for at in range(0, len(data), 1 << 16):
            self._channel.write(data[at : at + (1 << 16)])
            # The server may have had enough; what it said can still be read.
            with contextlib.suppress(trio.BrokenResourceError):
                await self._stream.send_all(self._channel.take())

    async def frame(self) -> hf.Frame | None:
        """The next frame that came; None at the end."""
        buffer = memoryview(bytearray(1 << 16))
        while True:
            if len(self._received) >= 9:
                header = memoryview(self._received)[:9]
                found, size = hf.Frame.parse_frame_header(header)
                if len(self._received) >= 9 + size:
                    found.parse_body(memoryview(self._received)[9 : 9 + size])
                    self._received = self._received[9 + size :]
                    return found
            if self._ended:
                return None
            try:
                ciphertext = await self._stream.receive_some(1 << 16)
                self._ended = not ciphertext
                self._channel.receive(memoryview(ciphertext))
                while size := self._channel.read_into(buffer):
                    self._received += buffer[:size]
            except (trio.BrokenResourceError, TlsError):  # an RST, or close_notify
                self._ended = True

    async def goaway(self) -> ErrorCodes:
        """The code with which the server ends it all."""
        with trio.fail_after(20):
            while (found := await self.frame()) is not None:
                if isinstance(found, hf.GoAwayFrame):
                    return ErrorCodes(found.error_code)
        raise AssertionError("the connection ended without GOAWAY")

    async def answer(self, stream_id: int) -> dict[bytes, bytes]:
        with trio.fail_after(20):
            while (found := await self.frame()) is not None:
                if isinstance(found, hf.HeadersFrame):
                    fields = dict(self.decoder.decode(found.data, raw=True))
                    if found.stream_id == stream_id:
                        return fields
        raise AssertionError("no answer")

    def request(self, stream_id: int, *more: tuple[bytes, bytes]) -> hf.HeadersFrame:
        block = self.encoder.encode([*CONNECT, *more])
        return hf.HeadersFrame(stream_id, block, flags=["END_HEADERS"])


@asynccontextmanager
async def attack(
    rig: Rig, settings: dict[int, int] | None = None, identity: SpiffeId = WEB
) -> AsyncIterator[Attacker]:
    """Past TLS, the preface and SETTINGS, beside a bystander's connection."""
    async with (
        bystander(rig),
        rig.listen(port=PORT) as listener,
        await dial(rig.client.netns, SERVER, 15008, CLIENT) as stream,
    ):
        sock = stream.socket._sock
        prepare(sock, ZTUNNELS.keepalive)
        tls = await rig.identities.tls(identity)
        channel = await shake_hands(
            sock, tls.client, Expectation(allowed=frozenset({DB})), server=False
        )
        attacker = Attacker(stream, channel, listener)
        await attacker.send(PREFACE, hf.SettingsFrame(0, settings=settings or {}))
        yield attacker


async def test_rapid_reset_is_told_to_calm_down(rig: Rig) -> None:
    async with attack(rig) as attacker:
        for at in range(0, 1500, 100):
            frames: list[hf.Frame] = []
            for n in range(at, at + 100):
                frames += [attacker.request(2 * n + 1), hf.RstStreamFrame(2 * n + 1, error_code=8)]
            await attacker.send(*frames)
        assert await attacker.goaway() is ErrorCodes.ENHANCE_YOUR_CALM


@pytest.mark.parametrize("size", [0, 8192], ids=["empty", "8 KiB each"])
async def test_a_flood_of_continuations_is_ended(rig: Rig, size: int) -> None:
    async with attack(rig) as attacker:
        await attacker.send(hf.HeadersFrame(1, b"\x00"))
        await attacker.send(*[hf.ContinuationFrame(1, bytes(size)) for _ in range(100)])
        assert await attacker.goaway() in (
            ErrorCodes.PROTOCOL_ERROR,
            ErrorCodes.ENHANCE_YOUR_CALM,
        )


FLOODS: list[hf.Frame] = [
    hf.SettingsFrame(0, settings={SettingCodes.INITIAL_WINDOW_SIZE: 1 << 20}),
    hf.PingFrame(0, bytes(8)),
    hf.PriorityFrame(1, depends_on=3, stream_weight=1),
]


@pytest.mark.parametrize("flood", FLOODS, ids=["settings", "ping", "priority"])
async def test_a_flood_of_control_frames_is_told_to_calm_down(rig: Rig, flood: hf.Frame) -> None:
    async with attack(rig) as attacker:
        await attacker.send(*[flood] * (CONTROL_FRAME_LIMIT + 10))
        assert await attacker.goaway() is ErrorCodes.ENHANCE_YOUR_CALM


async def test_a_peer_that_pings_now_and_then_is_never_told_so(rig: Rig) -> None:
    async with attack(rig) as attacker:
        for _ in range(CONTROL_FRAME_LIMIT // 2):
            await attacker.send(hf.PingFrame(0, bytes(8)))
        await attacker.send(attacker.request(1))
        assert (await attacker.answer(1))[b":status"] == b"200"


async def test_oversize_headers_end_the_tunnel(rig: Rig) -> None:
    async with attack(rig) as attacker:
        # As long as it is: 70 KiB in a list that may have 64.
        big = [(b"x-%d" % n, bytes([97 + n % 26]) * 1000) for n in range(70)]
        block = attacker.encoder.encode([*CONNECT, *big], huffman=False)
        pieces = [block[at : at + 16384] for at in range(0, len(block), 16384)]
        await attacker.send(
            hf.HeadersFrame(1, pieces[0]),
            *[hf.ContinuationFrame(1, piece) for piece in pieces[1:-1]],
            hf.ContinuationFrame(1, pieces[-1], flags=["END_HEADERS"]),
        )
        assert await attacker.goaway() is ErrorCodes.ENHANCE_YOUR_CALM


async def test_a_window_of_zero_stalls_its_own_stream_and_costs_no_memory(rig: Rig) -> None:
    zero = {SettingCodes.INITIAL_WINDOW_SIZE: 0}
    async with attack(rig, zero) as attacker:
        await attacker.send(attacker.request(1))
        assert (await attacker.answer(1))[b":status"] == b"200"
        sent = 0
        async with await attacker.app.accept() as app:
            with trio.move_on_after(1):
                while sent < 64 << 20:
                    await app.send_all(bytes(1 << 16))
                    sent += 1 << 16
            # What the kernel buffers between app and agent, and no more.
            assert sent < 32 << 20
            assert rig.server.connections.list()[-1].bytes_received == 0
            # The other streams of this very tunnel go on.
            await attacker.send(attacker.request(3), hf.PingFrame(0, b"12345678"))
            assert (await attacker.answer(3))[b":status"] == b"200"
            # And it does once it may.
            await attacker.send(hf.WindowUpdateFrame(1, window_increment=1000))
            with trio.fail_after(5):
                while not isinstance(found := await attacker.frame(), hf.DataFrame):
                    assert found is not None
            assert (found.stream_id, len(found.data)) == (1, 1000)


async def test_the_201st_stream_is_refused_and_the_others_live(rig: Rig) -> None:
    async with attack(rig) as attacker:
        await attacker.send(*[attacker.request(2 * n + 1) for n in range(201)])
        refused = None
        with trio.fail_after(20):
            while refused is None:
                found = await attacker.frame()
                assert found is not None
                if isinstance(found, hf.RstStreamFrame):
                    refused = found
        assert (refused.stream_id, refused.error_code) == (401, ErrorCodes.REFUSED_STREAM)
