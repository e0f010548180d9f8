"""Revoked peers: the tunnels that stand end with their connections, the next get none."""

from __future__ import annotations

import pytest

from meshbpf.agent.core.traffic import FLAG_AT, Reporter
from tests.unit.forwarder.rig import DB, WEB, Rig, Side, expect_reset
from tests.unit.forwarder.test_tunnels import settled

pytestmark = [pytest.mark.root, pytest.mark.compat]


async def test_a_client_that_is_revoked_loses_its_connections_and_gets_no_other(rig: Rig) -> None:
    async with rig.listen() as listener:
        async with rig.joined(listener) as (client, app):
            assert rig.identities.revoke(WEB) == 1
            await expect_reset(client)
            await expect_reset(app)
        await settled(lambda: "CERT_REVOKED" in _flags(rig.server))
        async with await rig.dial() as refused:
            await expect_reset(refused)
    # Twice: a tunnel that dies before its first answer is tried again.
    assert rig.server.connections.telemetry.denied_early_counts() == {
        ("destination", "cert-revoked"): 2
    }
    assert rig.identities.revocations.rejected == {Reporter.DESTINATION: 3}


async def test_a_server_that_is_revoked_is_flagged_at_the_clients_end(rig: Rig) -> None:
    async with rig.listen() as listener:
        async with rig.joined(listener) as (client, app):
            assert rig.identities.revoke(DB) == 1
            await expect_reset(client)
            await expect_reset(app)
        async with await rig.dial() as refused:
            await expect_reset(refused)
    await settled(lambda: _flags(rig.client) == {"CERT_REVOKED": 2})
    assert rig.identities.revocations.rejected == {Reporter.SOURCE: 2}


async def test_a_renewed_certificate_is_let_in_again_and_other_tunnels_never_notice(
    rig: Rig,
) -> None:
    async with rig.listen() as listener, rig.joined(listener):
        old = dict(rig.identities.serials)
        rig.identities.renew()
        rig.client.pod.pool.drain()
        async with rig.joined(listener) as (client, app):
            assert rig.identities.serials[WEB] != old[WEB]
            rig.identities.serials[WEB] = old[WEB]
            assert rig.identities.revoke(WEB) == 1, "the tunnel of the old certificate"
            await client.send_all(b"still here")
            assert await app.receive_some(100) == b"still here"


def _flags(side: Side) -> dict[str, int]:
    """How many connections failed, by response flag."""
    found: dict[str, int] = {}
    for labels, series in side.connections.telemetry.traffic._series.items():
        if series.failed:
            found[labels[FLAG_AT]] = found.get(labels[FLAG_AT], 0) + series.failed
    return found
