"""The trace of a connection goes through a real CONNECT, from one forwarder to the other."""

from __future__ import annotations

import pytest
import trio

from meshbpf.agent.config import otlp_endpoint
from meshbpf.agent.runtime.otlp_export import OtlpExporter
from meshbpf.agent.runtime.otlp_post import Collector
from tests.unit.forwarder.rig import HBONE_VIP, SERVER, Rig, listening
from tests.unit.telemetry.collector import FakeCollector, attributes, collecting

pytestmark = pytest.mark.root


def exporter_to(collector: FakeCollector, node: str) -> OtlpExporter:
    endpoint = otlp_endpoint(collector.url)
    assert endpoint is not None
    return OtlpExporter(Collector(endpoint, 5.0), node)


@pytest.mark.parametrize("client_exports", [True, False])
async def test_the_server_s_span_is_of_the_client_s_trace(rig: Rig, client_exports: bool) -> None:
    async with collecting() as ours, collecting() as theirs, trio.open_nursery() as nursery:
        near, far = exporter_to(ours, "near"), exporter_to(theirs, "far")
        # The access log is the process's, which both forwarders are in: spans are theirs alone.
        rig.client.connections.telemetry.exporter = near if client_exports else None
        rig.server.connections.telemetry.exporter = far
        nursery.start_soon(near.run)
        nursery.start_soon(far.run)
        listener = trio.SocketListener(
            trio.socket.from_stdlib_socket(listening(rig.server.netns, SERVER, 8080))
        )
        with trio.fail_after(10):
            async with (
                listener,
                await rig.dial(HBONE_VIP, 8080) as client,
                await listener.accept() as app,
            ):
                await client.send_all(b"hello")
                assert await app.receive_some() == b"hello"
            for side in (rig.client, rig.server):
                while side.connections.list():  # noqa: ASYNC110 (it tells nobody of its end)
                    await trio.sleep(0.01)
            await near.finish()
            await far.finish()
        nursery.cancel_scope.cancel()
    (server,) = theirs.spans()
    assert server.name == "inbound HBONE"
    assert attributes(server)["bytes_recv"] == 5
    if client_exports:
        (client_span,) = ours.spans()
        assert client_span.name == "outbound HBONE"
        assert server.trace_id == client_span.trace_id
        assert server.parent_span_id == client_span.span_id
    else:
        assert not ours.spans()
        assert len(server.trace_id) == 16
        assert not server.parent_span_id
