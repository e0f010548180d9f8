"""A real agent's access log and spans at a collector beside it, in its own network namespace."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from meshbpf.agent.wire.pb import otlp_pb2 as pb
from tests.progs.program import eventually
from tests.progs.server import ECHO
from tests.telemetry.web import Web
from tests.testbed import Testbed
from tests.unit.telemetry.collector import FakeCollector, attributes

pytestmark = [pytest.mark.root, pytest.mark.netns]


@pytest.mark.compat
def test_a_connection_between_nodes_is_one_trace_with_a_line_at_each_end(
    bed: Testbed, web: Web, collectors: Mapping[int, FakeCollector]
) -> None:
    with bed.connect(bed["n1a"], bed["n2a"].ipv4, ECHO) as sock:
        host, port = sock.getsockname()
        source = f"{host}:{port}"
        sock.sendall(b"hello")
        assert sock.recv(5) == b"hello"

    def client_span() -> pb.Span | None:
        found = collectors[1].spans()
        return next((one for one in found if attributes(one)["src.addr"] == source), None)

    def server_span() -> pb.Span | None:
        found = collectors[2].spans()
        return next((one for one in found if one.parent_span_id == client.span_id), None)

    client = eventually("the client's span", client_span)
    server = eventually("the server's span", server_span)
    assert server.trace_id == client.trace_id
    assert (client.name, server.name) == ("outbound HBONE", "inbound HBONE")
    # Each counts from its own pod.
    assert attributes(client)["bytes_sent"] == attributes(server)["bytes_recv"] == 5
    for node, span in ((1, client), (2, server)):
        eventually(
            "its line",
            lambda node=node, span=span: [  # type: ignore[misc]
                line for line in collectors[node].lines() if line.span_id == span.span_id
            ],
        )
        metrics = web.metrics(node)
        assert metrics["meshbpf_otlp_records_exported_total"]['{signal="spans"}'] >= 1
        assert metrics["meshbpf_otlp_records_dropped_total"] == {
            '{signal="logs"}': 0,
            '{signal="spans"}': 0,
        }
