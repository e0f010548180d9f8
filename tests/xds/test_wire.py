"""Messages of the control plane: what is read from them, what is refused."""

from __future__ import annotations

import contextlib
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshbpf.agent.core.csr import AnswerError
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.service import LoadBalancerMode, LoadBalancerScope, Service, Visibility
from meshbpf.agent.core.workload import NamespacedHostname, TunnelProtocol, Workload
from meshbpf.agent.wire import istio_ca, xds
from meshbpf.agent.wire.pb import citadel_pb2
from meshbpf.agent.wire.pb import workload_pb2 as pb
from meshbpf.agent.wire.xds_policies import read_authorization
from meshbpf.agent.wire.xds_records import RecordError, RecordReader
from tests.xds import records

pytestmark = pytest.mark.xds
WEB = SpiffeId("cluster.local", "shop", "web")


def read(name: str, payload: bytes) -> Workload | Service:
    return RecordReader().address(name, payload)


def test_what_istiod_leaves_out_has_ztunnels_defaults() -> None:
    bare = pb.Address(workload=pb.Workload(uid="u", name="n", namespace="ns"))
    found = read("u", bare.SerializeToString())
    assert isinstance(found, Workload)
    assert found.identity == SpiffeId("cluster.local", "ns", "default")
    assert (found.cluster_id, found.capacity, found.workload_type) == (
        "Kubernetes",
        1,
        "deployment",
    )
    assert found.tunnel_protocol is TunnelProtocol.NONE
    assert found.waypoint is None


def test_a_service_is_read_with_ranges_waypoint_and_balancing() -> None:
    payload = records.service(
        "web.h",
        "10.9.0.1",
        waypoint=pb.GatewayAddress(
            hostname=pb.NamespacedHostname(namespace="shop", hostname="wp.h"), hbone_mtls_port=15008
        ),
        load_balancing=pb.LoadBalancing(
            routing_preference=[pb.LoadBalancing.ZONE, pb.LoadBalancing.NODE],
            mode=pb.LoadBalancing.FAILOVER,
        ),
        subject_alt_names=["spiffe://cluster.local/ns/shop/sa/web", "dns-name"],
        visibility=pb.Service.NAMESPACE,
    )
    message = pb.Address.FromString(payload)
    message.service.addresses.add(address=ip_address("10.8.0.0").packed, length=16)
    found = read("shop/web.h", message.SerializeToString())
    assert isinstance(found, Service)
    assert [one.ip for one in found.addresses] == [ip_address("10.9.0.1")]
    assert [one.cidr for one in found.cidr_addresses] == [ip_network("10.8.0.0/16")]
    assert found.waypoint is not None
    assert found.waypoint.destination == NamespacedHostname("shop", "wp.h")
    assert found.load_balancing is not None
    assert found.load_balancing.mode is LoadBalancerMode.FAILOVER
    assert found.load_balancing.routing_preference == (
        LoadBalancerScope.ZONE,
        LoadBalancerScope.NODE,
    )
    assert found.subject_alt_names == (WEB,)
    assert found.visibility is Visibility.NAMESPACE


def test_a_mapped_address_is_the_ipv4_address() -> None:
    found = read(records.uid("a"), records.workload("a", "::ffff:10.0.0.1"))
    assert isinstance(found, Workload)
    assert found.addresses == (ip_address("10.0.0.1"),)


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (records.workload("a", tunnel_protocol=2), "tunnel protocol 2"),
        (records.workload("a", tunnel_protocol=9), "tunnel protocol 9"),
        (records.workload("a", services={"nowhere": {80: 1}}), "not NAMESPACE/HOSTNAME"),
        (records.workload("a", services={"n/h": {70_000: 1}}), "port 70000"),
        (records.workload("a", waypoint=pb.GatewayAddress()), "without an address"),
        (records.workload("a", service_account="a/b"), "cannot be a part of an identity"),
        (records.workload("b"), "inside"),
        (b"", "neither a workload nor a service"),
        (b"\xff", "not an istio.workload.Address"),
    ],
)
def test_a_resource_that_makes_no_sense_is_refused_with_the_reason(
    payload: bytes, why: str
) -> None:
    with pytest.raises(RecordError, match=why):
        read(records.uid("a"), payload)


def test_an_address_of_odd_length_is_refused() -> None:
    message = pb.Address.FromString(records.workload("a"))
    message.workload.addresses.append(b"\x01\x02\x03")
    with pytest.raises(RecordError, match="3 bytes"):
        read(records.uid("a"), message.SerializeToString())


def test_pods_of_one_deployment_share_what_is_alike() -> None:
    reader = RecordReader()
    one, two = (
        reader.address(
            records.uid(name), records.workload(name, ip, services={"shop/web.h": {80: 8080}})
        )
        for name, ip in (("web-1", "10.0.0.1"), ("web-2", "10.0.0.2"))
    )
    assert isinstance(one, Workload)
    assert isinstance(two, Workload)
    assert one.services is two.services
    assert one.identity is two.identity


@given(st.binary(max_size=200))
def test_no_bytes_make_a_reader_fail_otherwise(payload: bytes) -> None:
    for reader in (lambda: read("a", payload), lambda: read_authorization("a/b", payload)):
        with contextlib.suppress(RecordError):
            reader()
    with contextlib.suppress(MeshbpfError):
        xds.decode(payload)
    with contextlib.suppress(AnswerError):
        istio_ca.decode(WEB, payload)


def test_metadata_of_the_environment_is_text_or_json() -> None:
    environ = {
        "ISTIO_META_A": "1",
        "ISTIO_METAJSON_B": '{"c": [1, true]}',
        "INSTANCE_IP": "10.0.0.9",
    }
    node = xds.node(environ, "node1", "Kubernetes")
    found: dict[str, Any] = dict(node.metadata)
    assert (found["A"], found["B"]["c"][1], found["INSTANCE_IPS"]) == ("1", True, "10.0.0.9")
    assert node.id.startswith("ztunnel~10.0.0.9~")
    with pytest.raises(MeshbpfError, match="ISTIO_METAJSON_B"):
        xds.node({"ISTIO_METAJSON_B": "{"}, "node1", "Kubernetes")


def test_the_last_part_of_a_certificate_answer_is_the_bundle() -> None:
    answer = citadel_pb2.IstioCertificateResponse(cert_chain=["leaf", "middle\n", "root1\nroot2"])
    found = istio_ca.decode(WEB, answer.SerializeToString())
    assert found == istio_ca.CaAnswer(b"leaf\nmiddle\n", b"root1\nroot2\n")
    for parts in ([], ["leaf"]):
        short = citadel_pb2.IstioCertificateResponse(cert_chain=parts).SerializeToString()
        with pytest.raises(AnswerError, match="no leaf with roots"):
            istio_ca.decode(WEB, short)
