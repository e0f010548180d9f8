"""Kubernetes objects as mesh state: workloads and services as istiod sends them."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
import yaml

from meshbpf.agent.core.kube_cluster import Cluster
from meshbpf.agent.core.kube_mesh import translate
from meshbpf.agent.core.local_xds import parse_local_xds
from meshbpf.agent.core.manifest import parse_manifest
from meshbpf.agent.core.objects import ObjectSet
from meshbpf.agent.core.service import (
    HealthPolicy,
    IPFamilies,
    LoadBalancerMode,
    LoadBalancerScope,
    LoadBalancing,
)
from meshbpf.agent.core.workload import (
    ApplicationTunnel,
    GatewayAddress,
    HealthStatus,
    Locality,
    NamespacedHostname,
    NetworkMode,
    TunnelFraming,
    TunnelProtocol,
)
from tests.progs import pod as testbed_pod
from tests.progs.kube_objects import mesh_objects
from tests.unit.core.kube import BY_HAND, LIVE, POD, service, told, translated, workload

pytestmark = pytest.mark.compat

WEB = NamespacedHostname("shop", "web.shop.svc.cluster.local")
SERVICE = """\
    apiVersion: v1
    kind: Service
    metadata: {name: web, namespace: shop}
    spec: {selector: {app: web}, clusterIP: 198.19.1.1, ports: [{port: 80, targetPort: 8080}]}
    """
ENROLLED = "{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: \
{istio.io/dataplane-mode: ambient}}}"


def test_the_demos_mesh_in_kubernetes_objects_is_the_same_model_as_in_local_xds() -> None:
    def pod(name: str, node: int, index: int, account: str, captured: bool) -> testbed_pod.Pod:
        return testbed_pod.Pod(name, f"tb-{name}", node, index, account, captured=captured)

    pods = [
        pod("n1a", 1, 1, "shop", True),
        pod("n1b", 1, 2, "shop", True),
        pod("n1x", 1, 3, "legacy", False),
        pod("n2a", 2, 1, "stock", True),
        pod("n2b", 2, 2, "billing", True),
        pod("n2x", 2, 3, "legacy", False),
    ]
    local = parse_local_xds(
        yaml.safe_dump(
            {
                # What a control plane adds to what a person writes by hand.
                "workloads": [
                    testbed_pod.workload(each) | {"canonicalRevision": "latest"} for each in pods
                ],
                "services": [
                    testbed_pod.service(each)
                    | {"canonical": True, "ports": testbed_pod.service(each)["ports"] | {80: 0}}
                    for each in pods
                ],
            }
        ),
        "mesh.yaml",
    )
    text = yaml.safe_dump_all(mesh_objects(pods))
    found = translate(ObjectSet.of(parse_manifest(text, "mesh.yaml")), BY_HAND)
    assert found.problems == ()
    assert found.state == local


def test_a_pod_is_the_workload_that_istiod_makes_of_it() -> None:
    found = workload(
        translated(
            """
            apiVersion: v1
            kind: Pod
            metadata:
              name: web-7d4b9c-xk2lp
              generateName: web-7d4b9c-
              namespace: shop
              labels: {app: shopfront, pod-template-hash: 7d4b9c, version: v2}
              annotations: {ambient.istio.io/redirection: enabled}
              ownerReferences: [{kind: ReplicaSet, name: web-7d4b9c, controller: true}]
            spec: {nodeName: node1, serviceAccountName: web, containers: []}
            status:
              phase: Running
              podIP: 198.18.1.1
              podIPs: [{ip: 198.18.1.1}, {ip: "fd00:6d62:1::1"}]
              conditions: [{type: Ready, status: "True"}]
            """,
            """
            apiVersion: v1
            kind: Node
            metadata:
              name: node1
              labels:
                topology.kubernetes.io/region: eu
                topology.kubernetes.io/zone: eu-1
                topology.istio.io/subzone: rack3
            """,
            cluster=Cluster(cluster_id="east", network="n1", trust_domain="corp.example"),
        ),
        "web-7d4b9c-xk2lp",
    )
    assert found.uid == "east//Pod/shop/web-7d4b9c-xk2lp"
    assert found.addresses == (ip_address("198.18.1.1"), ip_address("fd00:6d62:1::1"))
    assert (found.network, found.cluster_id) == ("n1", "east")
    assert str(found.identity) == "spiffe://corp.example/ns/shop/sa/web"
    assert found.tunnel_protocol is TunnelProtocol.HBONE
    assert not found.native_tunnel
    assert (found.workload_name, found.workload_type) == ("web", "pod")
    assert (found.canonical_name, found.canonical_revision) == ("shopfront", "v2")
    assert found.locality == Locality("eu", "eu-1", "rack3")
    assert found.status is HealthStatus.HEALTHY


@pytest.mark.parametrize(
    ("kind", "owner", "labels", "name"),
    [
        ("ReplicaSet", "web-abc", "pod-template-hash: abc", "web"),
        ("ReplicaSet", "web-abc", "app: x", "web-abc"),
        ("ReplicaSet", "web-abc", "rollouts-pod-template-hash: abc", "web"),
        ("StatefulSet", "db", "app: x", "db"),
        ("Job", "backup-28012345", "app: x", "backup"),
        ("Job", "backup-now", "app: x", "backup-now"),
        ("ReplicationController", "web-1", "deploymentconfig: web", "web"),
        ("ReplicaSet", "web-abc", "service.istio.io/workload-name: told", "told"),
    ],
)
def test_a_workload_is_called_by_what_made_its_pod(
    kind: str, owner: str, labels: str, name: str
) -> None:
    found = translated(
        f"""
        apiVersion: v1
        kind: Pod
        metadata:
          name: p
          generateName: p-
          namespace: shop
          labels: {{{labels}}}
          ownerReferences: [{{kind: {kind}, name: {owner}, controller: true}}]
        status: {{podIP: 198.18.1.1}}
        """
    )
    assert workload(found, "p").workload_name == name


def test_a_live_cluster_speaks_hbone_to_pods_that_are_annotated_and_by_hand_to_those_labelled() -> (
    None
):
    assert workload(translated(ENROLLED, POD)).tunnel_protocol is TunnelProtocol.HBONE
    live = workload(translated(ENROLLED, POD, cluster=LIVE))
    assert live.tunnel_protocol is TunnelProtocol.NONE
    tunnel = POD.replace("app: web", "networking.istio.io/tunnel: 'x,http'")
    native = workload(translated(tunnel, cluster=LIVE))
    assert (native.tunnel_protocol, native.native_tunnel) == (TunnelProtocol.HBONE, True)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("nodeName", "hostNetwork: true, nodeName"), "host's network"),
        (
            ("labels:", "annotations: {sidecar.istio.io/status: '{}'}, labels:"),
            "it has a sidecar",
        ),
    ],
)
def test_host_network_and_sidecar_pods_are_left_alone_and_told(
    change: tuple[str, str], why: str
) -> None:
    found = translated(ENROLLED, POD.replace(*change))
    assert workload(found).tunnel_protocol is TunnelProtocol.NONE
    (line,) = told(found)
    assert line.startswith("mesh.yaml:3: Pod shop/web-0: metadata.labels[istio.io/dataplane-mode]")
    assert why in line


def test_a_pod_opts_out_of_its_namespaces_enrolment() -> None:
    out = POD.replace("app: web", "istio.io/dataplane-mode: none")
    assert workload(translated(ENROLLED, out)).tunnel_protocol is TunnelProtocol.NONE
    own = POD.replace("app: web", "istio.io/dataplane-mode: ambient")
    assert workload(translated(own)).tunnel_protocol is TunnelProtocol.HBONE


@pytest.mark.parametrize(
    "status",
    ["{phase: Succeeded, podIP: 198.18.1.1}", "{phase: Failed, podIP: 198.18.1.1}", "{}"],
)
def test_a_pod_that_ended_or_has_no_address_is_no_workload(status: str) -> None:
    found = translated(POD.replace("{phase: Running, podIP: 198.18.1.1}", status))
    assert (found.state.workloads, found.problems) == ((), ())


def test_only_ready_pods_that_stay_are_healthy() -> None:
    def status(text: str, metadata: str = "") -> HealthStatus:
        pod = POD.replace("podIP:", f"{text}podIP:").replace("labels:", f"{metadata}labels:")
        return workload(translated(pod, cluster=LIVE)).status

    ready = 'conditions: [{type: Ready, status: "True"}], '
    assert status(ready) is HealthStatus.HEALTHY
    assert status(ready.replace("True", "False")) is HealthStatus.UNHEALTHY
    assert status("") is HealthStatus.UNHEALTHY
    assert status(ready, "deletionTimestamp: now, ") is HealthStatus.UNHEALTHY
    assert workload(translated(POD)).status is HealthStatus.HEALTHY  # by hand nobody says it


def test_a_service_finds_its_pods_by_selector_and_named_ports_by_container() -> None:
    pod = POD.replace(
        "containers: []",
        "containers: [{ports: [{name: http, containerPort: 8081}]}], initContainers: ["
        "{restartPolicy: Always, ports: [{name: metrics, containerPort: 9090}]},"
        "{ports: [{name: never, containerPort: 1}]}]",
    )
    named = SERVICE.replace(
        "[{port: 80, targetPort: 8080}]",
        "[{port: 80, targetPort: http}, {port: 81, targetPort: metrics}, {port: 82},"
        " {port: 83, targetPort: never}, {port: 53, protocol: UDP}]",
    )
    found = translated(pod, named)
    assert service(found).ports == {80: 0, 81: 0, 82: 82, 83: 0}
    assert workload(found).services == {WEB: {80: 8081, 81: 9090, 82: 82}}
    other = translated(POD.replace("app: web", "app: other"), SERVICE)
    assert workload(other).services == {}
    elsewhere = translated(POD, SERVICE.replace("namespace: shop", "namespace: bank"))
    assert workload(elsewhere).services == {}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("", None),
        (
            "internalTrafficPolicy: Local, ",
            LoadBalancing((LoadBalancerScope.NODE,), LoadBalancerMode.STRICT),
        ),
        (
            "trafficDistribution: PreferClose, ",
            LoadBalancing(
                (LoadBalancerScope.NETWORK, LoadBalancerScope.REGION, LoadBalancerScope.ZONE),
                LoadBalancerMode.FAILOVER,
            ),
        ),
        (
            "publishNotReadyAddresses: true, ",
            LoadBalancing(health_policy=HealthPolicy.ALLOW_ALL),
        ),
    ],
)
def test_a_services_balancing_is_what_its_spec_asks_for(
    spec: str, expected: LoadBalancing | None
) -> None:
    found = translated(SERVICE.replace("selector:", f"{spec}selector:"))
    assert service(found).load_balancing == expected


def test_traffic_distribution_is_inherited_from_the_namespaces_annotation() -> None:
    namespace = "{apiVersion: v1, kind: Namespace, metadata: {name: shop, annotations: \
{networking.istio.io/traffic-distribution: PreferSameNode}}}"
    balancing = service(translated(namespace, SERVICE)).load_balancing
    assert balancing is not None
    assert balancing.routing_preference[-1] is LoadBalancerScope.NODE
    own = SERVICE.replace(
        "namespace: shop",
        "namespace: shop, annotations: {networking.istio.io/traffic-distribution: Any}",
    )
    assert service(translated(namespace, own)).load_balancing is None


def test_headless_and_external_services() -> None:
    headless = SERVICE.replace("clusterIP: 198.19.1.1", "clusterIP: None, clusterIPs: [None]")
    assert service(translated(headless)).addresses == ()
    external = SERVICE.replace("selector:", "type: ExternalName, externalName: a.b, selector:")
    assert translated(external).state.services == ()


def test_a_services_address_families() -> None:
    def families(text: str) -> IPFamilies:
        return service(
            translated(SERVICE.replace("selector:", f"ipFamilies: {text}, selector:"))
        ).ip_families

    assert families("[IPv4]") is IPFamilies.IPV4_ONLY
    assert families("[IPv6]") is IPFamilies.IPV6_ONLY
    assert families("[IPv6, IPv4]") is IPFamilies.DUAL
    assert service(translated(SERVICE)).ip_families is IPFamilies.AUTOMATIC


SLICE = """\
    apiVersion: discovery.k8s.io/v1
    kind: EndpointSlice
    metadata: {name: web-x, namespace: shop, labels: {kubernetes.io/service-name: web}}
    addressType: IPv4
    ports: [{name: http, port: 9000, protocol: TCP}, {name: dns, port: 53, protocol: UDP}]
    endpoints:
    - {addresses: [198.51.100.7]}
    - {addresses: [198.51.100.8], conditions: {ready: false}}
    - {addresses: [198.18.1.1], targetRef: {kind: Pod, name: web-0, namespace: shop}}
    """


def test_endpoints_without_a_pod_are_bare_workloads() -> None:
    bare = SERVICE.replace("selector: {app: web}, ", "").replace(
        "{port: 80", "{name: http, port: 80"
    )
    found = translated(POD, bare, SLICE)
    one, two = (each for each in found.state.workloads if each.name == "web-x")
    assert one.uid == "Kubernetes/discovery.k8s.io/EndpointSlice/shop/web-x/198.51.100.7"
    assert (one.status, two.status) == (HealthStatus.HEALTHY, HealthStatus.UNHEALTHY)
    assert one.network_mode is NetworkMode.HOST_NETWORK
    assert one.services == {WEB: {80: 9000}}
    # And the pod that the slice names is one of the service, though no selector finds it.
    assert workload(found).services == {WEB: {80: 8080}}


GATEWAY = """\
    apiVersion: gateway.networking.k8s.io/v1
    kind: Gateway
    metadata: {name: waypoint, namespace: shop, labels: {istio.io/waypoint-for: all}}
    spec:
      gatewayClassName: istio-waypoint
      listeners: [{name: mesh, port: 15008, protocol: HBONE}]
    status: {addresses: [{type: Hostname, value: waypoint.shop.svc.cluster.local}]}
    """
USING = "{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: \
{istio.io/use-waypoint: waypoint}}}"


def test_a_namespaces_waypoint_stands_before_its_services_and_pods_but_not_its_own() -> None:
    own = POD.replace("web-0", "waypoint-0").replace(
        "app: web", "gateway.networking.k8s.io/gateway-name: waypoint"
    )
    found = translated(USING, GATEWAY, SERVICE, POD, own)
    at = GatewayAddress(NamespacedHostname("shop", "waypoint.shop.svc.cluster.local"))
    assert service(found).waypoint == at
    assert workload(found).waypoint == at
    assert workload(found, "waypoint-0").waypoint is None
    assert found.problems == ()


def test_a_waypoint_that_is_not_there_is_told_and_left_out() -> None:
    found = translated(USING, SERVICE)
    assert service(found).waypoint is None
    (line,) = told(found)
    assert "Service shop/web: metadata.labels[istio.io/use-waypoint]" in line
    assert "shop/waypoint, and there is no such Gateway" in line


def test_a_sandwiched_waypoints_pods_want_their_connections_framed() -> None:
    gateway = GATEWAY.replace(
        "labels:", "annotations: {ambient.istio.io/waypoint-inbound-binding: PROXY/15088}, labels:"
    )
    own = POD.replace("app: web", "gateway.networking.k8s.io/gateway-name: waypoint")
    assert workload(translated(gateway, own)).application_tunnel == ApplicationTunnel(
        TunnelFraming.PROXY, 15088
    )


def test_a_malformed_gateway_costs_itself_alone() -> None:
    found = translated(USING, GATEWAY.replace("listeners: [{", "listeners: [7, {"), SERVICE)
    assert service(found).waypoint is None
    assert "Gateway shop/waypoint: spec.listeners[0]" in told(found)[0]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            POD.replace("198.18.1.1", "198.18.1"),
            "Pod shop/web-0: status.podIP: '198.18.1' is not an IP address",
        ),
        (
            POD.replace("serviceAccountName: web", "serviceAccountName: a/b"),
            "Pod shop/web-0: spec.serviceAccountName: 'a/b' cannot be a part of an identity",
        ),
        (
            SERVICE.replace("port: 80", "port: 80000"),
            "Service shop/web: spec.ports[0].port: 80000 is not between 1 and 65535",
        ),
        (
            SERVICE.replace("selector: {app: web}", "selector: [app]"),
            "Service shop/web: spec.selector: expected a mapping, found ['app']",
        ),
        (
            SERVICE + "---\n" + SLICE.replace("addresses: [198.51.100.7]", "addresses: [x]"),
            "EndpointSlice shop/web-x: endpoints[0].addresses[0]: 'x' is not an IP address",
        ),
    ],
)
def test_a_bad_object_is_told_by_name_field_and_reason_and_costs_itself_alone(
    text: str, line: str
) -> None:
    good = POD.replace("web-0", "other")
    found = translated(good, *text.split("---\n"))
    assert workload(found, "other")
    assert line in told(found)[0]
    assert len(found.broken) == 1
