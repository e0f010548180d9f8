"""Metrics and access log of connections that really went through two agents."""

from __future__ import annotations

import re
import socket
from typing import Any

import pytest

from tests.netns.talk import echo, receive_all, refused
from tests.progs.pod import NAMESPACE, Pod
from tests.progs.program import eventually
from tests.progs.server import ECHO
from tests.telemetry.web import Web
from tests.testbed import Testbed

pytestmark = [pytest.mark.root, pytest.mark.netns]

TEXT = b"0123456789" * 7


def carry(bed: Testbed, client: Pod, server: Pod) -> int:
    """One connection from its start to its orderly end; the client's port."""
    with bed.connect(client, server.ipv4, ECHO) as sock:
        port: int = sock.getsockname()[1]
        echo(sock, TEXT)
        sock.shutdown(socket.SHUT_WR)
        assert receive_all(sock) == b""
    return port


def labels(text: str) -> dict[str, str]:
    return dict(re.findall(r'(\w+)="([^"]*)"', text))


def between(values: dict[str, float], **wanted: str) -> list[tuple[dict[str, str], float]]:
    """The series that have these labels."""
    found = [(labels(text), value) for text, value in values.items()]
    return [one for one in found if wanted.items() <= one[0].items()]


def line_of(web: Web, node: int, **wanted: Any) -> dict[str, Any]:
    found: list[dict[str, Any]] = []

    def look() -> bool:
        found[:] = [
            line for line in web.log_lines(node) if all(line.get(k) == v for k, v in wanted.items())
        ]
        return bool(found)

    eventually(f"an access log line with {wanted}", look, 10.0)
    return found[-1]


@pytest.mark.compat
@pytest.mark.parametrize(
    ("node", "reporter"), [(1, "source"), (2, "destination")], ids=["source", "destination"]
)
def test_both_reporters_count_a_tunneled_connection(
    bed: Testbed, web: Web, node: int, reporter: str
) -> None:
    client, server = bed["n1a"], bed["n2a"]
    wanted = {
        "reporter": reporter,
        "source_principal": client.identity,
        "destination_principal": server.identity,
        "connection_security_policy": "mutual_tls",
        "response_flags": "-",
        "request_protocol": "tcp",
    }

    def total(name: str) -> float:
        found = between(web.metrics(node).get(f"istio_tcp_{name}_total", {}), **wanted)
        return sum(value for _, value in found)

    names = ("connections_opened", "connections_closed", "received_bytes", "sent_bytes")
    before = {name: total(name) for name in names}
    carry(bed, client, server)
    eventually(
        "the end was counted",
        lambda: total("connections_closed") == before["connections_closed"] + 1,
        10.0,
    )
    grown = {name: total(name) - before[name] for name in names}
    assert grown == {
        "connections_opened": 1,
        "connections_closed": 1,
        "received_bytes": len(TEXT),
        "sent_bytes": len(TEXT),
    }


@pytest.mark.compat
def test_plaintext_has_no_source_principal_and_an_unknown_security_policy(
    bed: Testbed, web: Web
) -> None:
    client, server = bed["n1x"], bed["n2a"]
    with bed.connect(client, server.ipv4, ECHO) as sock:
        echo(sock, TEXT)
        opened = web.metrics(2)["istio_tcp_connections_opened_total"]
    found = between(opened, reporter="destination", connection_security_policy="unknown")
    assert any(
        one["source_principal"] == "unknown" and one["destination_principal"] == server.identity
        for one, _ in found
    )


@pytest.mark.compat
def test_open_sockets_and_bytes_are_seen_while_a_connection_lives(bed: Testbed, web: Web) -> None:
    client, server = bed["n1a"], bed["n2b"]
    with bed.connect(client, server.ipv4, ECHO) as sock:
        echo(sock, TEXT)
        metrics = web.metrics(1)
    assert metrics["istio_tcp_sockets_open"]['{reporter="source"}'] >= 1
    sent = between(metrics["istio_tcp_received_bytes_total"], destination_principal=server.identity)
    assert sum(value for _, value in sent) >= len(TEXT)


@pytest.mark.compat
def test_access_log_lines_of_both_ends_have_ztunnels_fields(bed: Testbed, web: Web) -> None:
    client, server = bed["n1a"], bed["n2a"]
    port = carry(bed, client, server)
    source = line_of(web, 1, **{"src.addr": f"{client.ipv4}:{port}"})
    assert source["message"] == "connection complete"
    assert source["level"] == "info"
    assert source["dst.addr"] == f"{server.ipv4}:15008"
    assert source["dst.hbone_addr"] == f"{server.ipv4}:{ECHO}"
    assert (source["src.identity"], source["dst.identity"]) == (client.identity, server.identity)
    assert (source["direction"], source["bytes_sent"], source["bytes_recv"]) == (
        "outbound",
        len(TEXT),
        len(TEXT),
    )
    assert re.fullmatch(r"\d+ms", source["duration"])
    assert "error" not in source
    asked = f"{server.ipv4}:{ECHO}"
    destination = line_of(
        web, 2, **{"dst.hbone_addr": asked, "src.identity": client.identity, "level": "info"}
    )
    assert destination["dst.addr"] == f"{server.ipv4}:15008"
    assert destination["direction"] == "inbound"
    for line in (source, destination):
        assert list(line)[:4] == ["level", "time", "scope", "message"]
        assert (line["src.workload"], line["dst.workload"]) == (client.name, server.name)
        assert line["src.namespace"] == line["dst.namespace"] == NAMESPACE
        assert line["src.cluster"] == line["dst.cluster"] == "Kubernetes"


@pytest.mark.compat
def test_identities_are_logged_only_under_mutual_tls(bed: Testbed, web: Web) -> None:
    port = carry(bed, bed["n1x"], bed["n2a"])
    line = line_of(web, 2, **{"src.addr": f"{bed['n1x'].ipv4}:{port}"})
    assert "src.identity" not in line
    assert "dst.identity" not in line
    assert line["dst.addr"] == f"{bed['n2a'].ipv4}:{ECHO}"
    assert "dst.hbone_addr" not in line


@pytest.mark.compat
def test_a_denial_is_flagged_deny_and_logged_as_an_error(bed: Testbed, web: Web) -> None:
    client, server = bed["n1a"], bed["n2a"]
    rules = [[[{"destinationPorts": [ECHO]}]]]
    with bed.policy(action="Deny", rules=rules):
        refused(bed, client, server.ipv4)
        line = line_of(web, 2, level="error", direction="inbound")
        assert line["message"] == "connection complete"
        assert "DENY policy" in line["error"]
        for name in ("connections_failed", "connections_closed"):
            values = web.metrics(2)[f"istio_tcp_{name}_total"]
            assert between(values, reporter="destination", response_flags="DENY")


@pytest.mark.slow
def test_a_tunnel_port_that_does_not_answer_is_flagged_network_policy(
    bed: Testbed, web: Web
) -> None:
    # A dial gives up after 10 s, as ztunnel's does.
    refused(bed, bed["n1a"], bed.gone.ipv4, within_s=20.0)

    def failed() -> bool:
        values = web.metrics(1).get("istio_tcp_connections_failed_total", {})
        return bool(between(values, reporter="source", response_flags="NETWORK_POLICY"))

    eventually("the failure was counted", failed, 10.0)
