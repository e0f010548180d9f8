"""Access log lines, as text and as JSON, cell by cell."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator

import pytest

from meshbpf.agent.config import LogFormat, LogLevel
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.traffic import Reporter, parse_baggage
from meshbpf.agent.runtime import logs
from meshbpf.agent.runtime.connections import LiveConnection
from meshbpf.agent.runtime.telemetry import Telemetry
from tests.unit.telemetry import samples

pytestmark = pytest.mark.compat


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def written(
    act: Callable[[Telemetry], None], form: LogFormat = "plain", level: LogLevel = "info"
) -> list[str]:
    stream = io.StringIO()
    writer = logs.set_up(level, form, stream)
    act(Telemetry(monotonic=lambda: 0.0345))
    writer.close()
    return stream.getvalue().splitlines()


def ended(live: LiveConnection) -> Callable[[Telemetry], None]:
    def act(telemetry: Telemetry) -> None:
        telemetry.opened(live)
        live.sent.total, live.received.total = 84, 175
        telemetry.closed(live)

    return act


def test_the_end_of_an_outbound_connection_is_ztunnels_line() -> None:
    (line,) = written(ended(samples.outbound()))
    moment, *cells = line.split("\t")
    assert len(moment) == len("2024-05-15T09:03:01.166444Z")
    assert cells[:3] == ["info", "access", "connection complete"]
    assert cells[3] == (
        'src.addr=198.18.1.1:40000 src.workload="web-0" src.namespace="shop" '
        'src.identity="spiffe://cluster.local/ns/shop/sa/web" src.cluster="cluster1" '
        "dst.addr=198.18.2.1:15008 dst.hbone_addr=198.18.2.1:15432 "
        'dst.service="db.stock.svc.cluster.local" dst.workload="db-0" dst.namespace="stock" '
        'dst.identity="spiffe://cluster.local/ns/stock/sa/db" dst.cluster="cluster1" '
        'direction="outbound" bytes_sent=84 bytes_recv=175 duration="34ms"'
    )


def test_an_inbound_line_keeps_port_15008_and_counts_from_its_own_pod() -> None:
    (line,) = written(ended(samples.inbound()), "json")
    found = json.loads(line)
    assert found.pop("time").endswith("Z")
    assert found == {
        "level": "info",
        "scope": "access",
        "message": "connection complete",
        "src.addr": "198.18.1.1:50000",
        "src.workload": "web-0",
        "src.namespace": "shop",
        "src.identity": "spiffe://cluster.local/ns/shop/sa/web",
        "src.cluster": "cluster1",
        "dst.addr": "198.18.2.1:15008",
        "dst.hbone_addr": "198.18.2.1:15432",
        "dst.service": "db.stock.svc.cluster.local",
        "dst.workload": "db-0",
        "dst.namespace": "stock",
        "dst.identity": "spiffe://cluster.local/ns/stock/sa/db",
        "dst.cluster": "cluster1",
        "direction": "inbound",
        "bytes_sent": 175,
        "bytes_recv": 84,
        "duration": "34ms",
    }


def test_plaintext_shows_no_identity_and_no_tunnel() -> None:
    (line,) = written(ended(samples.plaintext()))
    assert "identity" not in line
    assert "hbone_addr" not in line
    assert "src.addr=198.18.7.7:1234 dst.addr=198.18.2.1:15432" in line


def test_a_client_that_only_its_baggage_names_is_named_by_it() -> None:
    live = samples.inbound()
    live.source_workload = None
    live.source_described = parse_baggage("service.name=caller,k8s.namespace.name=far")
    (line,) = written(ended(live))
    assert 'src.workload="caller" src.namespace="far"' in line


def test_a_failure_is_an_error_with_its_reason() -> None:
    live = samples.outbound()
    live.fail(MeshbpfError("connect-failed", 'connect to x: "ECONNREFUSED"'))
    (line,) = written(ended(live))
    assert line.split("\t")[1] == "error"
    assert line.endswith('duration="34ms" error="connect to x: \\"ECONNREFUSED\\""')


def test_an_opening_is_told_at_debug_only() -> None:
    first, _last = written(ended(samples.outbound()), level="debug")
    cells = first.split("\t")
    assert cells[1:4] == ["debug", "access", "connection opened"]
    assert cells[4].endswith('direction="outbound"')
    assert "bytes" not in cells[4]


def test_an_early_denial_is_a_warning_with_four_fields() -> None:
    def act(telemetry: Telemetry) -> None:
        telemetry.denied_early(
            Reporter.DESTINATION,
            samples.address("198.18.7.7:1"),
            samples.address("198.18.2.1:15008"),
            MeshbpfError("tls-handshake", "no certificate"),
        )
        assert telemetry.denied_early_counts() == {("destination", "tls-handshake"): 1}
        (denial,) = telemetry.denials()
        assert denial.reason == "no certificate"

    (line,) = written(act)
    assert line.split("\t")[1:] == [
        "warn",
        "access",
        "connection failed",
        'src.addr=198.18.7.7:1 dst.addr=198.18.2.1:15008 direction="inbound" '
        'error="no certificate"',
    ]


def test_a_name_cannot_forge_an_access_log_field() -> None:
    live = samples.inbound()
    live.source_workload = None
    live.source_described = parse_baggage('service.name=x" dst.identity="forged\n')
    (line,) = written(ended(live))
    assert 'src.workload="x\\" dst.identity=\\"forged"' in line


async def test_the_last_denials_are_kept_and_no_more() -> None:
    from meshbpf.agent.runtime.telemetry import DENIALS_KEPT

    telemetry = Telemetry()
    for number in range(DENIALS_KEPT + 5):
        live = samples.inbound(number)
        telemetry.opened(live)
        live.fail(MeshbpfError("policy-denied", f"denial {number}"))
        telemetry.closed(live)
    kept = telemetry.denials()
    assert len(kept) == DENIALS_KEPT
    assert kept[0].reason == f"denial {DENIALS_KEPT + 4}"
