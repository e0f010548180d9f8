"""Who is let in, when, and what a change of mind does to live connections."""

from __future__ import annotations

import pytest
import trio

from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.local_xds import parse_local_xds
from meshbpf.agent.core.state import MeshDelta
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.tuning import ZTUNNELS
from meshbpf.agent.runtime import connections
from meshbpf.agent.runtime.handshake import shake_hands
from meshbpf.agent.runtime.sockets import prepare
from meshbpf.agent.wire.events import Headers, ResponseReceived
from meshbpf.agent.wire.hbone import HboneConnection
from meshbpf.agent.wire.tls import Expectation
from tests.unit.forwarder.rig import (
    DB,
    DENY_ALL,
    DENY_WEB,
    MESH,
    SERVER,
    WEB,
    Rig,
    dial,
    expect_reset,
    listening,
    mesh,
)

pytestmark = [pytest.mark.root, pytest.mark.compat]


async def status_of(rig: Rig, request: Headers, identity: SpiffeId = WEB) -> int:
    """The status that the server pod answers to one request."""
    raw = await dial(rig.client.netns, SERVER, 15008, "198.18.0.1")
    async with raw:
        sock = raw.socket._sock  # the forwarder's own functions take plain sockets
        prepare(sock, ZTUNNELS.keepalive)
        tls = await rig.identities.tls(identity)
        channel = await shake_hands(
            sock, tls.client, Expectation(allowed=frozenset({DB})), server=False
        )
        wire = HboneConnection(server=False)
        wire.start()
        wire.open(request)
        channel.write(wire.out)
        await raw.send_all(channel.take())
        buffer = memoryview(bytearray(65536))
        with trio.fail_after(5):
            while True:
                channel.receive(memoryview(await raw.receive_some(65536)))
                for event in wire.receive(buffer[: channel.read_into(buffer)]):
                    if isinstance(event, ResponseReceived):
                        return event.status


def connect(authority: bytes, *more: tuple[bytes, bytes]) -> Headers:
    return ((b":method", b"CONNECT"), (b":authority", authority), *more)


@pytest.mark.parametrize(
    ("request_headers", "status"),
    [
        (connect(b"198.18.0.2:8080"), 200),
        (connect(b"[fd00:6d62::2]:8080"), 503),  # ours, and nobody listens there
        (connect(b"198.18.0.2:8081"), 503),
        (connect(b"198.18.0.9:8080"), 400),
        (connect(b"198.18.0.2"), 400),
        (connect(b"198.18.0.2:0x50"), 400),
        (connect(b""), 400),
        (connect(b"198.18.0.2:8080", (b":path", b"/")), 400),
        (connect(b"198.18.0.2:15008"), 503),
        (connect(b"\xff:80"), 400),
        (
            (
                (b":method", b"GET"),
                (b":scheme", b"https"),
                (b":path", b"/"),
                (b":authority", b"198.18.0.2:8080"),
            ),
            400,
        ),
    ],
)
async def test_a_request_gets_its_status(rig: Rig, request_headers: Headers, status: int) -> None:
    async with rig.listen():
        assert await status_of(rig, request_headers) == status


async def test_a_denied_client_gets_401_and_the_app_sees_nothing(rig: Rig) -> None:
    rig.set_policies(DENY_WEB)
    async with rig.listen() as listener:
        assert await status_of(rig, connect(b"198.18.0.2:8080")) == 401
        assert await status_of(rig, connect(b"198.18.0.2:8080"), DB) == 200
        with trio.fail_after(2):
            await (await listener.accept()).aclose()
        async with await rig.dial() as client:
            await expect_reset(client)
        with trio.move_on_after(0.2):
            await listener.accept()
            pytest.fail("a denied connection reached the app")
    assert rig.server.connections.statistics().denied == 2


async def test_a_denied_connection_is_cut_when_the_policy_arrives(rig: Rig) -> None:
    async with rig.joined() as (client, app):
        await client.send_all(b"before")
        assert await app.receive_some(100) == b"before"
        assert rig.set_policies(DENY_WEB) == 1
        await expect_reset(client)
        await expect_reset(app)
    assert rig.server.connections.statistics().cut_by_policy == 1


async def test_a_policy_that_a_workload_push_attaches_cuts_live_connections(rig: Rig) -> None:
    """ztunnel judges live connections again when policies come, not when workloads do."""
    selector = DENY_WEB.replace("scope: Namespace", "scope: WorkloadSelector")
    text = MESH % selector
    attached = text.replace("- uid: s\n", "- uid: s\n  authorizationPolicies: [db/deny-web]\n")
    rig.state[0] = Snapshot.of(parse_local_xds(text, "detached"))
    async with rig.joined() as (client, app):
        assert rig.server.connections.recheck(rig.state[0]) == 0
        rig.state[0] = Snapshot.of(parse_local_xds(attached, "attached"))
        assert rig.server.connections.recheck(rig.state[0]) == 1
        await expect_reset(client)
        await expect_reset(app)


async def test_a_state_that_changes_no_policy_judges_nobody_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.set_policies(DENY_ALL.replace("rules: []", "rules: [[]]"))
    async with rig.joined():
        now = rig.state[0]
        assert rig.server.connections.recheck(now) == 0
        monkeypatch.setattr(connections, "decide", None)  # it would fail
        later = now.after(MeshDelta(removed_workloads=frozenset({"t"})), now.version + 1)
        assert rig.server.connections.recheck(later) == 0


async def test_plaintext_is_judged_and_cut_as_well(rig: Rig) -> None:
    # The app's port beside the inbound listener's, which is bound to v0.
    app_socket = listening(rig.server.netns, SERVER, 9000, device=b"lo")
    async with trio.SocketListener(trio.socket.from_stdlib_socket(app_socket)) as listener:
        async with await rig.dial_server(9000) as client:
            with trio.fail_after(2):
                app = await listener.accept()
            async with app:
                # It has no identity: a policy about web's says nothing of it.
                assert rig.set_policies(DENY_WEB) == 0
                assert rig.set_policies(DENY_ALL) == 1
                await expect_reset(client)
                await expect_reset(app)
        async with await rig.dial_server(9000) as client:
            await expect_reset(client)


async def test_a_connection_that_policy_still_allows_lives_on(rig: Rig) -> None:
    async with rig.joined() as (client, app):
        assert rig.set_policies("[]") == 0
        await client.send_all(b"after")
        assert await app.receive_some(100) == b"after"


async def test_a_pod_may_be_dialed_from_before_the_state_knows_it(rig: Rig) -> None:
    rig.state[0] = Snapshot.EMPTY
    async with rig.listen() as listener, await rig.dial() as client:
        await trio.sleep(0.3)
        rig.state[0] = mesh()
        with trio.fail_after(3):
            async with await listener.accept() as app:
                await client.send_all(b"patience")
                assert await app.receive_some(100) == b"patience"


async def test_somebody_else_at_the_gateway_gets_no_byte(rig: Rig) -> None:
    intruder = SpiffeId("cluster.local", "db", "intruder")
    rig.identities.issued[DB] = await rig.identities.tls(intruder)
    async with rig.listen() as listener, await rig.dial() as client:
        await client.send_all(b"secret")
        await expect_reset(client)
        with trio.move_on_after(0.1):
            await listener.accept()
            pytest.fail("the app was reached")
