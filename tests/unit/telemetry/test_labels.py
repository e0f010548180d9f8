"""The label sets of istio_tcp_* metrics, value by value."""

from __future__ import annotations

import pytest
from h2.errors import ErrorCodes

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.identity import IdentityError
from meshbpf.agent.core.traffic import (
    LABELS,
    Described,
    Reporter,
    ResponseFlag,
    inbound_service,
    labels,
    parse_baggage,
)
from meshbpf.agent.runtime.telemetry import flag_of
from meshbpf.agent.wire.errors import PeerError, RevokedError, TlsError
from tests.unit.telemetry import samples

pytestmark = pytest.mark.compat

WEB_LABELS = {
    "source_workload": "web",
    "source_canonical_service": "web",
    "source_canonical_revision": "v1",
    "source_workload_namespace": "shop",
    "source_principal": "spiffe://cluster.local/ns/shop/sa/web",
    "source_app": "web",
    "source_version": "v1",
    "source_cluster": "cluster1",
    "source_region": "north",
    "source_zone": "n1",
}
DB_LABELS = {
    "destination_workload": "db",
    "destination_canonical_service": "db",
    "destination_canonical_revision": "latest",
    "destination_workload_namespace": "stock",
    "destination_principal": "spiffe://cluster.local/ns/stock/sa/db",
    "destination_app": "db",
    "destination_version": "latest",
    "destination_cluster": "cluster1",
    "destination_region": "unknown",
    "destination_zone": "unknown",
}
SERVICE_LABELS = {
    "destination_service": "db.stock.svc.cluster.local",
    "destination_service_name": "db",
    "destination_service_namespace": "stock",
}
COMMON = {"request_protocol": "tcp", "response_flags": "-"}


def told(values: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(LABELS, values, strict=True))


def test_a_tunneled_connection_has_every_label_at_both_reporters() -> None:
    wanted = {
        **WEB_LABELS,
        **DB_LABELS,
        **SERVICE_LABELS,
        **COMMON,
        "connection_security_policy": "mutual_tls",
    }
    assert told(samples.outbound().labels()) == {**wanted, "reporter": "source"}
    assert told(samples.inbound().labels()) == {**wanted, "reporter": "destination"}


def test_unset_labels_are_the_word_unknown() -> None:
    found = told(samples.plaintext().labels())
    unknown = {name for name in LABELS if name.startswith("source_")} | set(SERVICE_LABELS)
    unknown |= {"connection_security_policy", "destination_region", "destination_zone"}
    assert {name for name, value in found.items() if value == "unknown"} == unknown
    # A plaintext connection still names whom it went to.
    assert found["destination_principal"] == DB_LABELS["destination_principal"]


def test_the_order_of_labels_is_ztunnels() -> None:
    assert LABELS[:2] == ("reporter", "source_workload")
    assert LABELS[9:12] == (
        "destination_service",
        "destination_service_namespace",
        "destination_service_name",
    )
    assert LABELS[20:] == (
        *("request_protocol", "response_flags", "connection_security_policy"),
        *("source_region", "source_zone", "destination_region", "destination_zone"),
    )
    assert len(LABELS) == len(set(LABELS)) == 27


def test_baggage_describes_a_client_that_the_mesh_does_not_know() -> None:
    said = parse_baggage(
        "k8s.cluster.name=c2,k8s.namespace.name=far,k8s.deployment.name=caller,"
        "service.name=calls,service.version=v9,cloud.region=south,cloud.availability_zone=s1,x=y"
    )
    assert said == Described("c2", "far", "caller", "calls", "v9", "south", "s1")
    found = told(
        labels(
            Reporter.DESTINATION,
            source=None,
            described=said,
            source_identity=samples.WEB_ID,
            destination=samples.DB,
            service=None,
            mutual_tls=True,
        )
    )
    assert {name: found[name] for name in found if name.startswith("source_")} == {
        "source_workload": "caller",
        "source_canonical_service": "calls",
        "source_canonical_revision": "v9",
        "source_workload_namespace": "far",
        "source_principal": "spiffe://cluster.local/ns/shop/sa/web",
        "source_app": "caller",
        "source_version": "v9",
        "source_cluster": "c2",
        "source_region": "south",
        "source_zone": "s1",
    }


def test_what_the_mesh_knows_of_a_client_outweighs_its_baggage() -> None:
    live = samples.inbound()
    live.source_described = parse_baggage("k8s.namespace.name=forged,service.name=forged")
    assert "forged" not in live.labels()


@pytest.mark.parametrize("text", ["", ",", "=", "a", "k8s.pod.name=", "k8s.pod.name"])
def test_odd_baggage_says_nothing(text: str) -> None:
    assert parse_baggage(text) == Described()


def test_the_service_of_an_inbound_connection_is_guessed_as_ztunnel_does() -> None:
    db, service = samples.DB, samples.DB_SERVICE
    mesh = samples.SNAPSHOT
    assert inbound_service(mesh, db, 15432, None, None) is service
    assert inbound_service(mesh, db, 1, "db.stock.svc.cluster.local", None) is service
    assert inbound_service(mesh, db, 1, "other.example", None) is None
    assert inbound_service(mesh, db, 1, None, service) is service


@pytest.mark.parametrize(
    ("error", "flag"),
    [
        (MeshbpfError("policy-denied", ""), ResponseFlag.DENY),
        (MeshbpfError("connect-failed", ""), ResponseFlag.CONNECT),
        (MeshbpfError("connect-timeout", ""), ResponseFlag.CONNECT),
        (MeshbpfError("gateway-timeout", ""), ResponseFlag.NETWORK_POLICY),
        (MeshbpfError("certificate-expired", ""), ResponseFlag.IDENTITY_ERROR),
        (IdentityError("x"), ResponseFlag.IDENTITY_ERROR),
        (TlsError("tls-handshake", ""), ResponseFlag.TLS_FAILURE),
        (RevokedError(""), ResponseFlag.CERT_REVOKED),
        (MeshbpfError("cert-revoked", ""), ResponseFlag.CERT_REVOKED),
        (PeerError(ErrorCodes.PROTOCOL_ERROR, ""), ResponseFlag.H2_HANDSHAKE_FAILURE),
        (ConnectionResetError(), ResponseFlag.CONNECT),
    ],
    ids=lambda value: str(getattr(value, "code", value)),
)
def test_a_failure_has_its_response_flag(error: Exception, flag: ResponseFlag) -> None:
    assert flag_of(error) is flag
