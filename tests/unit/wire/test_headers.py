"""HBONE's header fields."""

from __future__ import annotations

import re

import pytest

from meshbpf.agent.core.address import SocketAddress
from meshbpf.agent.core.workload import Locality, Workload
from meshbpf.agent.wire.headers import (
    baggage,
    connect_request,
    find,
    read_status,
    response,
    traceparent,
)

pytestmark = pytest.mark.compat


def test_baggage_has_istios_members_in_istios_order() -> None:
    workload = Workload(
        uid="1",
        name="web-1",
        namespace="shop",
        cluster_id="c1",
        workload_type="deployment",
        workload_name="web",
        canonical_name="web",
        canonical_revision="v2",
        locality=Locality(region="r", zone="z"),
    )
    assert baggage(workload) == (
        b"k8s.cluster.name=c1,k8s.namespace.name=shop,k8s.deployment.name=web,"
        b"service.name=web,service.version=v2,cloud.region=r,cloud.availability_zone=z"
    )


def test_baggage_leaves_out_what_is_empty() -> None:
    workload = Workload(uid="1", name="x", namespace="n", cluster_id="")
    assert baggage(workload) == b"k8s.namespace.name=n"


def test_baggage_never_carries_a_byte_that_a_header_may_not() -> None:
    workload = Workload(uid="1", name="x", namespace="n", cluster_id="a\r\nb\x00ü")
    assert b"k8s.cluster.name=ab," in baggage(workload)


@pytest.mark.parametrize(
    ("source", "host", "expected"),
    [
        ("127.0.0.1:80", None, b'for="127.0.0.1:80"'),
        ("[::1]:80", None, b'for="[::1]:80"'),
        ("127.0.0.1:80", "example.com", b'for="127.0.0.1:80";host=example.com'),
    ],
)
def test_forwarded_names_the_client_and_the_service(
    source: str, host: str | None, expected: bytes
) -> None:
    request = connect_request("10.0.0.1:80", b"", SocketAddress.parse(source), host, b"")
    assert find(request, b"forwarded") == expected


def test_a_traceparent_is_w3c_version_0_unsampled() -> None:
    text = traceparent(bytes(range(24))).decode()
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-00", text)
    assert text == "00-000102030405060708090a0b0c0d0e0f-1011121314151617-00"


def test_only_a_200_carries_baggage() -> None:
    assert response(200, b"a=b") == ((b":status", b"200"), (b"baggage", b"a=b"))
    assert response(503) == ((b":status", b"503"),)
    assert read_status(response(503)) == 503
    assert read_status(((b"x", b"y"),)) == 0
