"""TLS on port 15008 as a hostile or careless client uses it; the client is OpenSSL's own.

Each case states its outcome: which alert, how fast, and that a connection of
somebody else goes on meanwhile.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives import serialization

from meshbpf.agent.core import ca
from meshbpf.agent.runtime import handshake
from meshbpf.agent.runtime.handshake import HandshakePlaces
from meshbpf.agent.runtime.inbound import Inbound
from meshbpf.agent.wire.errors import TlsError
from tests.unit.forwarder.rig import CLIENT, SERVER, WEB, Rig

pytestmark = [pytest.mark.root, pytest.mark.compat]

LIMIT_S = 1.0
"""The limit of a handshake in some of the tests, where it is ten seconds else."""
HELLO = bytes.fromhex("160301020001")
"""The first bytes of a ClientHello of 508 bytes."""


@dataclass(frozen=True, slots=True)
class Openssl:
    """`openssl s_client` in the client's namespace, with a certificate of the mesh."""

    rig: Rig
    files: Path

    def command(self, *options: str, certificate: bool = True) -> list[str]:
        netns = f"/run/netns/fw-{os.getpid()}-c"
        words = ["nsenter", f"--net={netns}", "openssl", "s_client", "-connect", f"{SERVER}:15008"]
        words += ["-CAfile", str(self.files / "root.pem"), "-bind", CLIENT]
        if certificate:
            words += ["-cert", str(self.files / "cert.pem"), "-key", str(self.files / "key.pem")]
        return [*words, *options]

    async def run(self, *options: str, certificate: bool = True, stdin: bytes = b"") -> str:
        """All that it printed; it ends by itself when its input does, or is refused."""
        with trio.fail_after(20):
            done = await trio.run_process(
                self.command(*options, certificate=certificate),
                stdin=stdin,
                capture_stdout=True,
                stderr=subprocess.STDOUT,
                check=False,
            )
        return done.stdout.decode(errors="replace")


@pytest.fixture
def openssl(rig: Rig, tmp_path: Path) -> Openssl:
    key, now = ca.new_key(), datetime.now(UTC)
    authority = rig.identities.authority
    chain = authority.issue(
        WEB, key.public_key(), now - timedelta(minutes=1), now + timedelta(hours=1)
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (tmp_path / "cert.pem").write_bytes(chain)
    (tmp_path / "key.pem").write_bytes(pem)
    (tmp_path / "root.pem").write_bytes(authority.roots_pem)
    return Openssl(rig, tmp_path)


@asynccontextmanager
async def bystander(rig: Rig) -> AsyncIterator[None]:
    """Somebody's connection that must work before, during and after the block."""
    async with rig.listen() as listener, rig.joined(listener) as (client, app):
        for text in (b"before", b"after"):
            await client.send_all(text)
            assert await app.receive_some(100) == text
            if text == b"before":
                yield
        async with rig.joined(listener) as (client, app):
            await client.send_all(b"new")
            assert await app.receive_some(100) == b"new"


REFUSED = [
    # options, whether with a certificate, what OpenSSL says of the alert
    (("-tls1_2", "-alpn", "h2"), True, "protocol version"),
    (("-tls1_1", "-alpn", "h2", "-cipher", "DEFAULT@SECLEVEL=0"), True, "protocol version"),
    (("-tls1_3", "-alpn", "http/1.1"), True, "no application protocol"),
    (
        ("-tls1_3", "-alpn", "h2", "-ciphersuites", "TLS_CHACHA20_POLY1305_SHA256"),
        True,
        "handshake",
    ),
    (("-tls1_3", "-alpn", "h2", "-ign_eof"), False, "certificate required"),
]


@pytest.mark.parametrize(
    ("options", "certificate", "alert"),
    REFUSED,
    ids=["TLS 1.2", "TLS 1.1", "bad ALPN", "another cipher", "no certificate"],
)
async def test_a_wrong_handshake_is_refused_with_its_alert(
    rig: Rig, openssl: Openssl, options: tuple[str, ...], certificate: bool, alert: str
) -> None:
    async with bystander(rig):
        said = await openssl.run(*options, certificate=certificate, stdin=b"\n" * 10)
    assert f"alert {alert}" in said


async def test_a_client_that_offers_no_protocol_must_speak_http_2_all_the_same(
    rig: Rig, openssl: Openssl
) -> None:
    """As with ztunnel: only an offer without h2 is refused by TLS."""
    async with bystander(rig):
        get = b"GET / HTTP/1.1\r\n\r\n"
        said = await openssl.run("-tls1_3", "-ign_eof", "-quiet", stdin=get)
    assert "\0\0\x08\x07\0" in said  # GOAWAY, and the end


async def test_renegotiation_does_not_exist_and_ends_only_who_tries_it(
    rig: Rig, openssl: Openssl
) -> None:
    async with bystander(rig):
        # "R" at the start of a line asks for it; TLS 1.3 has none (RFC 8446, section 4.1.2).
        said = await openssl.run("-tls1_3", "-alpn", "h2", stdin=b"R\n")
    assert "RENEGOTIATING" in said
    assert "wrong ssl version" in said


async def test_a_key_update_is_answered_and_the_tunnel_goes_on(rig: Rig, openssl: Openssl) -> None:
    async with bystander(rig):
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)[:3] + b"\x04" + bytes(5)
        said = await openssl.run("-tls1_3", "-alpn", "h2", stdin=b"K\n" + preface)
    assert "KEYUPDATE" in said
    assert "alert" not in said


async def connect(rig: Rig, first: bytes) -> trio.SocketStream:
    sock = trio.socket.from_stdlib_socket(
        rig.client.netns.socket(socket.AF_INET, socket.SOCK_STREAM)
    )
    await sock.bind((CLIENT, 0))
    await sock.connect((SERVER, 15008))
    stream = trio.SocketStream(sock)
    if first:
        await stream.send_all(first)
    return stream


@pytest.mark.parametrize("first", [b"", HELLO], ids=["silent", "half a hello"])
async def test_a_handshake_that_stops_is_ended_by_the_limit(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, first: bytes
) -> None:
    async with bystander(rig):
        monkeypatch.setattr(handshake, "HANDSHAKE_TIMEOUT_S", LIMIT_S)
        async with await connect(rig, first) as stream:
            with trio.fail_after(5 * LIMIT_S):
                assert await stream.receive_some(100) == b""


async def test_a_handshake_that_drips_is_ended_by_the_same_limit(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bystander(rig):
        monkeypatch.setattr(handshake, "HANDSHAKE_TIMEOUT_S", LIMIT_S)
        async with await connect(rig, HELLO) as stream:
            sent = 0
            with trio.fail_after(10 * LIMIT_S), contextlib.suppress(trio.BrokenResourceError):
                while sent < 500:
                    await stream.send_all(b"\0")
                    await trio.sleep(LIMIT_S / 50)
                    sent += 1
            assert sent < 500  # of the 508 that the hello has


async def test_silent_connections_make_room_for_those_who_speak(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = HandshakePlaces(8)
    monkeypatch.setattr(handshake, "HANDSHAKE_TIMEOUT_S", 60.0)
    for each in await _inbounds():
        monkeypatch.setattr(each, "_handshakes", places)
    async with AsyncExitStack() as stack:
        for n in range(40):
            await stack.enter_async_context(await connect(rig, HELLO if n % 2 else b""))
        with trio.fail_after(30):
            while places.evicted < 32:  # noqa: ASYNC110
                await trio.sleep(0.01)
        with trio.fail_after(30):  # the limit of a handshake is a minute here
            async with rig.joined() as (client, app):
                await client.send_all(b"hello")
                assert await app.receive_some(100) == b"hello"


async def test_places_are_given_back() -> None:
    places = HandshakePlaces(2)
    for _ in range(5):
        with places.place() as place:
            place.answered()
    assert places.evicted == 0

    async def wait() -> None:
        with pytest.raises(TlsError), places.place():
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(2):  # each takes the place of the oldest
            with places.place() as place:
                place.answered()
            await trio.testing.wait_all_tasks_blocked()
        assert places.evicted == 1
        nursery.cancel_scope.cancel()


@pytest.mark.slow
async def test_ten_thousand_idle_connections_keep_nobody_out(rig: Rig) -> None:
    idle: list[socket.socket] = []
    places = [each._handshakes for each in await _inbounds()]
    try:
        for n in range(10_000):
            sock = rig.client.netns.socket(socket.AF_INET, socket.SOCK_STREAM)
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.bind((CLIENT, 0))
            sock.connect_ex((SERVER, 15008))
            idle.append(sock)
            # Idle ones, and no storm of new ones: that is the kernel's queue to bear.
            with trio.fail_after(30):
                while n % 100 == 0 and sum(each.taken for each in places) < n:  # noqa: ASYNC110
                    await trio.sleep(0.01)
        # Without eviction it would be the time of five handshakes' limits: 50 s.
        with trio.fail_after(20):
            async with rig.listen() as listener, await rig.dial() as client:
                await client.send_all(b"hello")
                async with await listener.accept() as app:
                    assert await app.receive_some(100) == b"hello"
    finally:
        for sock in idle:
            sock.close()


async def _inbounds() -> list[Inbound]:
    """The inbound halves of all pods, once their forwarders have begun."""
    await trio.testing.wait_all_tasks_blocked()
    return [each for each in gc.get_objects() if isinstance(each, Inbound)]
