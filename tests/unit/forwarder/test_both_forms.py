"""A tunnel against a peer that plays with everything the protocol leaves open, in both forms.

The peer is hyperframe over our TLS: frames of any size, padded or not, empty,
mixed with PING, PRIORITY and unknown frames, cut anywhere into records and
segments. The apps read in fits and starts. All bytes must arrive, in order,
within the windows, and be credited back to the last one.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import sysconfig
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
import trio.testing
from hyperframe import frame as hf

from meshbpf.agent.core import ca
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.tuning import Tuning
from meshbpf.agent.runtime import native, reactor
from meshbpf.agent.runtime.handshake import shake_hands
from meshbpf.agent.runtime.stream import ByteCount, TunnelStream
from meshbpf.agent.runtime.tunnel import Tunnel
from meshbpf.agent.wire import headers
from meshbpf.agent.wire.events import RequestReceived
from meshbpf.agent.wire.frames import PREFACE
from meshbpf.agent.wire.tls import Expectation, WorkloadTls, workload_tls
from meshbpf.agent.wire.tls_channel import TlsChannel

PEER = SpiffeId("cluster.local", "web", "peer")
STREAMS = 3
BYTES_EACH_WAY = 700_000
REQUEST = [(":method", "CONNECT"), (":authority", "198.18.0.2:80")]
# Never-indexed literals: one block serves every stream.
BLOCK = b"".join(
    b"\x10" + b"".join(bytes((len(text),)) + text.encode() for text in field) for field in REQUEST
)
UNKNOWN_FRAME = bytes((0, 0, 5, 0x77, 0, 0, 0, 0, 0)) + b"extra"


def identity() -> WorkloadTls:
    now = datetime.now(UTC)
    authority = ca.create("cluster.local", now - timedelta(hours=1))
    key = ca.new_key()
    chain = authority.issue(
        PEER, key.public_key(), now - timedelta(minutes=1), now + timedelta(hours=1)
    )
    return workload_tls(chain, key, authority.roots_pem)


class App:
    """What is behind one stream: sends its bytes and reads the peer's, at an uneven pace."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.received = bytearray()
        self.done = trio.Event()
        self.sends = rng.randbytes(rng.randrange(1, BYTES_EACH_WAY))
        self.ours, theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.end = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))

    async def run(self) -> None:
        async with self.end, trio.open_nursery() as nursery:
            nursery.start_soon(self._send)
            while data := await self.end.receive_some(self.rng.choice((1000, 70_000, 400_000))):
                self.received += data
                if self.rng.random() < 0.2:
                    await trio.sleep(0.001)
        self.done.set()

    async def _send(self) -> None:
        left = self.sends
        while left:
            size = self.rng.choice((1, 64, 5_000, 300_000))
            await self.end.send_all(left[:size])
            left = left[size:]
            if self.rng.random() < 0.2:
                await trio.sleep(0.001)
        await self.end.send_eof()


class Peer:
    """The far side of the tunnel, a client."""

    def __init__(self, rng: random.Random, sock: socket.socket, channel: TlsChannel) -> None:
        self.rng, self.sock, self.channel = rng, sock, channel
        self.sends = {
            1 + 2 * i: rng.randbytes(rng.randrange(1, BYTES_EACH_WAY)) for i in range(STREAMS)
        }
        self.received: dict[int, bytearray] = defaultdict(bytearray)
        self.ended: set[int] = set()
        self.credited: dict[int, int] = defaultdict(int)
        self.flow_controlled = 0
        self.answered: dict[int, trio.Event] = {each: trio.Event() for each in self.sends}
        self._out = trio.Lock()
        self._input = bytearray()

    async def run(self) -> None:
        settings = hf.SettingsFrame(0, settings={4: 1 << 20}).serialize()
        opened = hf.WindowUpdateFrame(0, window_increment=1 << 24).serialize()
        requests = b"".join(
            hf.HeadersFrame(each, BLOCK, flags=["END_HEADERS"]).serialize() for each in self.sends
        )
        await self._write(PREFACE + settings + opened + requests)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read)
            for stream_id in self.sends:
                nursery.start_soon(self._send, stream_id)

    async def _send(self, stream_id: int) -> None:
        await self.answered[stream_id].wait()
        left = self.sends[stream_id]
        while left:
            size = self.rng.choice((0, 1, 64, 9_000, 16_384, 60_000, 200_000))
            data = hf.DataFrame(stream_id, left[:size])
            left = left[size:]
            if self.rng.random() < 0.2:
                data.flags.add("PADDED")
                data.pad_length = self.rng.randrange(256)
            if not left and self.rng.random() < 0.5:
                data.flags.add("END_STREAM")
            self.flow_controlled += data.flow_controlled_length
            between = self.rng.choice(
                (
                    b"",
                    b"",
                    b"",
                    UNKNOWN_FRAME,
                    hf.PingFrame(0, b"12345678").serialize(),
                    hf.PriorityFrame(stream_id, depends_on=0).serialize(),
                )
            )
            await self._write(data.serialize() + between)
        if "END_STREAM" not in data.flags:
            await self._write(hf.DataFrame(stream_id, b"", flags=["END_STREAM"]).serialize())

    async def _write(self, data: bytes) -> None:
        """In records and segments of any size; frames of one call stay together."""
        async with self._out:
            while data:
                size = self.rng.choice((5, 300, 20_000, 1 << 20))
                self.channel.write(data[:size])
                data = data[size:]
                if self.rng.random() < 0.3:
                    await self._flush()
            await self._flush()

    async def _flush(self) -> None:
        left = memoryview(self.channel.take())
        while left:
            try:
                left = left[self.sock.send(left[: self.rng.choice((7, 5_000, 1 << 20))]) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.sock)
            await trio.lowlevel.checkpoint()

    async def _read(self) -> None:
        plain = memoryview(bytearray(1 << 18))
        while len(self.ended) < STREAMS or sum(self.credited.values()) == 0:
            await trio.lowlevel.wait_readable(self.sock)
            data = self.sock.recv(1 << 18)
            assert data, "the tunnel closed"
            self.channel.receive(memoryview(data))
            while size := self.channel.read_into(plain):
                self._input += plain[:size]
            await self._parse()

    async def _parse(self) -> None:
        grants = bytearray()
        while len(self._input) >= 9:
            frame, length = hf.Frame.parse_frame_header(memoryview(self._input)[:9])
            if len(self._input) < 9 + length:
                break
            frame.parse_body(memoryview(bytes(self._input[9 : 9 + length])))
            del self._input[: 9 + length]
            match frame:
                case hf.HeadersFrame():
                    self.answered[frame.stream_id].set()
                case hf.DataFrame():
                    self.received[frame.stream_id] += frame.data
                    if frame.data:
                        for where in (0, frame.stream_id):
                            grants += hf.WindowUpdateFrame(
                                where, window_increment=len(frame.data)
                            ).serialize()
                    if "END_STREAM" in frame.flags:
                        self.ended.add(frame.stream_id)
                case hf.WindowUpdateFrame():
                    self.credited[frame.stream_id] += frame.window_increment
                case hf.RstStreamFrame() | hf.GoAwayFrame():
                    raise AssertionError(f"the tunnel says {frame}")
        if grants:
            await self._write(bytes(grants))


@pytest.mark.parametrize("seed", range(6))
async def test_every_byte_arrives_whatever_the_peer_makes_of_the_protocol(
    form: str, seed: int, nursery: trio.Nursery
) -> None:
    rng = random.Random(seed)
    tls = identity()
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
    apps: dict[int, App] = {}
    all_closed = trio.Event()

    def on_request(tunnel: Tunnel, request: RequestReceived, stream: TunnelStream) -> None:
        apps[stream.id] = App(random.Random(seed + stream.id))
        nursery.start_soon(serve, tunnel, stream, apps[stream.id])

    async def serve(tunnel: Tunnel, stream: TunnelStream, app: App) -> None:
        nursery.start_soon(app.run)
        with trio.CancelScope() as scope:
            stream.bind(scope, ByteCount(), ByteCount())
            tunnel.respond(stream, headers.response(200), end_stream=False)
            await stream.relay(app.ours)
        assert not stream.failure
        stream.abandon()
        app.ours.close()
        await app.done.wait()
        if len(apps) == STREAMS and all(each.done.is_set() for each in apps.values()):
            all_closed.set()

    channels: list[TlsChannel] = []

    async def accept() -> None:
        expectation = Expectation(trust_domain="cluster.local")
        channels.append(await shake_hands(ours, tls.server, expectation, server=True))

    with trio.fail_after(30):
        async with trio.open_nursery() as hands:
            hands.start_soon(accept)
            expectation = Expectation(allowed=frozenset({PEER}))
            far = await shake_hands(theirs, tls.client, expectation, server=False)
        tunnel = Tunnel(ours, channels[0], nursery, server=True, on_request=on_request)
        assert (reactor.current().engine is not None) == (form == "c")
        tunnel.start()
        nursery.start_soon(tunnel.run)
        peer = Peer(rng, theirs, far)
        await peer.run()
        await all_closed.wait()
    assert (tunnel.handle is not None) == (form == "c")
    for stream_id, app in apps.items():
        assert bytes(app.received) == peer.sends[stream_id]
        assert bytes(peer.received[stream_id]) == app.sends
    # What was credited and what is held back for the next update is all that was announced.
    window = tunnel.parts().wire.receive_window
    assert window.available + window._uncredited == Tuning().tunnel_window_bytes
    assert peer.flow_controlled < STREAMS * Tuning().stream_window_bytes
    tunnel.close("done")
    theirs.close()
    await trio.testing.wait_all_tasks_blocked()  # it says goodbye and closes its socket


def test_the_loop_in_c_is_there_where_it_can_be_built() -> None:
    headers_there = Path(sysconfig.get_path("include"), "Python.h").exists()
    if not (shutil.which("gcc") and headers_there):
        pytest.skip("no gcc, or no python3-dev")
    if os.environ.get("MESHBPF_PURE_PYTHON"):
        pytest.skip("MESHBPF_PURE_PYTHON is set")
    assert native.available()
