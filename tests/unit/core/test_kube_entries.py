"""ServiceEntry and WorkloadEntry as mesh state: what istiod's ambient index makes of them."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.kube_cluster import Cluster
from meshbpf.agent.core.kube_mesh import Translation
from meshbpf.agent.core.service import (
    HealthPolicy,
    LoadBalancerMode,
    LoadBalancerScope,
    LoadBalancing,
    NetworkCidr,
    Service,
)
from meshbpf.agent.core.workload import (
    GatewayAddress,
    HealthStatus,
    Locality,
    NamespacedHostname,
    NetworkAddress,
    TunnelProtocol,
    Workload,
)
from tests.unit.core.kube import LIVE, POD, told, translated, workload

pytestmark = pytest.mark.compat

API = NamespacedHostname("shop", "api.example.com")
ENTRY = """\
    apiVersion: networking.istio.io/v1
    kind: ServiceEntry
    metadata: {name: api, namespace: shop}
    spec:
      hosts: [api.example.com]
      addresses: [198.19.2.1]
      ports: [{number: 80, name: http, protocol: HTTP, targetPort: 8080}]
      resolution: STATIC
      endpoints: [{address: 198.51.100.7}]
    """
MACHINE = """\
    apiVersion: networking.istio.io/v1
    kind: WorkloadEntry
    metadata: {name: vm, namespace: shop, labels: {app: web}}
    spec: {address: 198.51.100.9, serviceAccount: vm}
    """
SELECTING = ENTRY.replace(
    "endpoints: [{address: 198.51.100.7}]", "workloadSelector: {labels: {app: web}}"
)
SERVICE = """\
    apiVersion: v1
    kind: Service
    metadata: {name: web, namespace: shop}
    spec:
      selector: {app: web}
      clusterIP: 198.19.1.1
      ports: [{name: http, port: 80, targetPort: 8080}]
    """
GATEWAY = """\
    apiVersion: gateway.networking.k8s.io/v1
    kind: Gateway
    metadata: {name: egress, namespace: shop, labels: {istio.io/waypoint-for: all}}
    spec: {gatewayClassName: meshbpf-waypoint, listeners: [{name: m, port: 15008, protocol: HBONE}]}
    status: {addresses: [{type: IPAddress, value: 198.19.9.9}]}
    """
WAYPOINT = GatewayAddress(NetworkAddress("", ip_address("198.19.9.9")))


def entry(*changes: tuple[str, str], text: str = ENTRY) -> str:
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return text


def service_at(found: Translation, hostname: str, namespace: str = "shop") -> Service:
    key = NamespacedHostname(namespace, hostname)
    return next(each for each in found.state.services if each.key == key)


def hosts(found: Translation) -> list[str]:
    return [str(each.key) for each in found.state.services]


def endpoints(found: Translation) -> list[Workload]:
    return [each for each in found.state.workloads if "/ServiceEntry/" in each.uid]


# --- services ---------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v1", "v1beta1", "v1alpha3"])
def test_each_host_of_an_entry_is_a_service_with_all_addresses_and_ports(version: str) -> None:
    text = entry(
        ("istio.io/v1", f"istio.io/{version}"),
        ("[api.example.com]", "[api.example.com, '*.api.example.com']"),
        ("[198.19.2.1]", "[198.19.2.1, 'fd00:6d62::7', 198.51.0.9/16, 198.19.2.3/32]"),
        ("targetPort: 8080}", "targetPort: 8080}, {number: 443, name: tls, protocol: TLS}"),
    )
    found = translated(text, cluster=Cluster(network="n1", by_hand=True))
    assert hosts(found) == ["shop/api.example.com", "shop/*.api.example.com"]
    one, other = found.state.services
    assert (one.name, one.ports, other.ports) == ("api", {80: 8080, 443: 443}, one.ports)
    assert [str(each) for each in one.addresses] == [
        "n1/198.19.2.1",
        "n1/fd00:6d62::7",
        "n1/198.19.2.3",
    ]
    assert one.cidr_addresses == (NetworkCidr("n1", ip_network("198.51.0.0/16")),)
    assert one.canonical
    assert found.problems == ()


def test_addresses_of_istiods_allocator_are_those_of_their_host() -> None:
    status = """status:
      addresses:
      - {value: 240.240.0.1, host: api.example.com}
      - {value: "2001:2::1", host: api.example.com}
      - {value: 240.240.0.2, host: b.example.com}
      - {value: 240.240.0.3, host: "*.c.example.com"}
    """
    text = entry(
        ("[api.example.com]", "[api.example.com, b.example.com, '*.c.example.com']"),
        ("      addresses: [198.19.2.1]\n", ""),
    )

    def given(text: str) -> list[list[str]]:
        services = translated(text + status).state.services
        return [[str(address.ip) for address in each.addresses] for each in services]

    assert given(text) == [["240.240.0.1", "2001:2::1"], ["240.240.0.2"], []]
    declined = "namespace: shop, labels: {networking.istio.io/enable-autoallocate-ip: 'False'}"
    assert given(entry(("namespace: shop", declined), text=text)) == [[], [], []]
    passed = entry(("STATIC\n      endpoints: [{address: 198.51.100.7}]", "NONE"), text=text)
    assert given(passed) == [[], [], []]
    assert given(ENTRY) == [["198.19.2.1"]]
    # And those of a wildcard where somebody looks names up for each request.
    wild = entry(
        ("[api.example.com, b.example.com, '*.c.example.com']", "['*.c.example.com']"),
        ("STATIC\n      endpoints: [{address: 198.51.100.7}]", "DYNAMIC_DNS"),
        text=text,
    )
    assert given(wild) == [["240.240.0.3"]]


def test_without_a_resolution_connections_go_where_the_client_dialed() -> None:
    found = translated(entry(("STATIC\n      endpoints: [{address: 198.51.100.7}]", "NONE")))
    balancing = LoadBalancing((), LoadBalancerMode.PASSTHROUGH, HealthPolicy.ALLOW_ALL)
    assert service_at(found, "api.example.com").load_balancing == balancing
    assert found.state.workloads == ()
    absent = entry(("      resolution: STATIC\n      endpoints: [{address: 198.51.100.7}]\n", ""))
    assert translated(absent).state == found.state


def test_traffic_distribution_is_the_entrys_or_its_namespaces_annotation() -> None:
    assert service_at(translated(ENTRY), "api.example.com").load_balancing is None
    annotation = "annotations: {networking.istio.io/traffic-distribution: PreferClose}"
    namespace = f"{{apiVersion: v1, kind: Namespace, metadata: {{name: shop, {annotation}}}}}"
    for texts in (
        (entry(("namespace: shop", f"namespace: shop, {annotation}")),),
        (namespace, ENTRY),
    ):
        balancing = service_at(translated(*texts), "api.example.com").load_balancing
        assert balancing is not None
        assert balancing.mode is LoadBalancerMode.FAILOVER
        assert balancing.routing_preference[-1] is LoadBalancerScope.ZONE


def test_names_of_the_server_that_are_identities_count() -> None:
    names = "subjectAltNames: ['spiffe://cluster.local/ns/shop/sa/api', api.example.com]"
    found = translated(entry(("resolution:", f"{names}\n      resolution:")))
    expected = (SpiffeId("cluster.local", "shop", "api"),)
    assert service_at(found, "api.example.com").subject_alt_names == expected


def test_udp_ports_are_left_out_and_may_be_named_by_endpoints() -> None:
    found = translated(
        entry(
            ("targetPort: 8080}", "targetPort: 8080}, {number: 53, name: dns, protocol: UDP}"),
            ("198.51.100.7}", "198.51.100.7, ports: {dns: 5353}}"),
        )
    )
    assert service_at(found, "api.example.com").ports == {80: 8080}
    (one,) = endpoints(found)
    assert one.services == {API: {80: 8080}}


def test_location_changes_nothing_and_export_is_told() -> None:
    found = translated(entry(("resolution:", "location: MESH_INTERNAL\n      resolution:")))
    assert found.state == translated(ENTRY).state
    exported = translated(entry(("resolution:", "exportTo: ['.']\n      resolution:")))
    assert exported.state == found.state
    (line,) = told(exported)
    assert "ServiceEntry shop/api: spec.exportTo" in line
    everywhere = translated(entry(("resolution:", "exportTo: ['*']\n      resolution:")))
    assert told(everywhere) == []


def test_a_waypoint_stands_before_an_entry_and_before_its_endpoints_by_their_own_labels() -> None:
    use = "labels: {istio.io/use-waypoint: egress}"
    found = translated(GATEWAY, entry(("namespace: shop", f"namespace: shop, {use}")))
    assert service_at(found, "api.example.com").waypoint == WAYPOINT
    assert endpoints(found)[0].waypoint is None
    own = translated(GATEWAY, entry(("198.51.100.7}", f"198.51.100.7, {use}}}")))
    assert service_at(own, "api.example.com").waypoint is None
    assert endpoints(own)[0].waypoint == WAYPOINT
    namespace = f"{{apiVersion: v1, kind: Namespace, metadata: {{name: shop, {use}}}}}"
    both = translated(GATEWAY, namespace, ENTRY)
    assert service_at(both, "api.example.com").waypoint == WAYPOINT
    assert endpoints(both)[0].waypoint == WAYPOINT
    (line,) = told(translated(entry(("198.51.100.7}", f"198.51.100.7, {use}}}"))))
    assert "spec.endpoints[0].labels[istio.io/use-waypoint]" in line


# --- whose a hostname is ------------------------------------------------------------

CLUSTER_NAME = "web.shop.svc.cluster.local"


def test_a_service_goes_before_an_entry_of_its_hostname_which_loses_its_endpoints() -> None:
    found = translated(entry(("[api.example.com]", f"[{CLUSTER_NAME}]")), SERVICE)
    assert hosts(found) == [f"shop/{CLUSTER_NAME}"]
    assert service_at(found, CLUSTER_NAME).name == "web"
    assert found.state.workloads == ()
    (line,) = told(found)
    assert f"ServiceEntry shop/api: spec.hosts[0]: {CLUSTER_NAME} is Service shop/web's" in line


def test_an_entry_of_another_namespace_has_the_hostname_there_alone() -> None:
    bank = entry(("[api.example.com]", f"[{CLUSTER_NAME}]"), ("namespace: shop", "namespace: bank"))
    found = translated(bank, SERVICE)
    assert service_at(found, CLUSTER_NAME).canonical
    assert not service_at(found, CLUSTER_NAME, "bank").canonical
    assert len(endpoints(found)) == 1
    assert found.problems == ()


def test_of_entries_with_one_hostname_the_oldest_wins_and_is_canonical() -> None:
    def made(name: str, namespace: str, day: int) -> str:
        about = (
            f"name: {name}, namespace: {namespace}, creationTimestamp: '2026-01-{day:02}T00:00:00Z'"
        )
        return entry(("name: api, namespace: shop", about))

    found = translated(made("a", "shop", 9), made("b", "shop", 3), made("c", "bank", 1))
    assert service_at(found, "api.example.com").name == "b"
    assert not service_at(found, "api.example.com").canonical
    assert service_at(found, "api.example.com", "bank").canonical
    assert {each.name for each in endpoints(found)} == {"b", "c"}
    (line,) = told(found)
    assert "ServiceEntry shop/a: spec.hosts[0]: api.example.com is ServiceEntry shop/b's" in line


def test_an_entry_that_loses_one_host_keeps_its_endpoints_for_the_others() -> None:
    found = translated(entry(("[api.example.com]", f"[{CLUSTER_NAME}, api.example.com]")), SERVICE)
    (one,) = endpoints(found)
    assert one.services == {API: {80: 8080}}


def test_a_slice_is_a_services_and_never_an_entrys() -> None:
    text = """\
    apiVersion: discovery.k8s.io/v1
    kind: EndpointSlice
    metadata: {name: web-x, namespace: shop, labels: {kubernetes.io/service-name: web}}
    addressType: IPv4
    ports: [{name: http, port: 9000}]
    endpoints: [{addresses: [198.51.100.8]}]
    """
    found = translated(entry(("[api.example.com]", f"[{CLUSTER_NAME}]")), text)
    assert [each.name for each in found.state.workloads] == ["api"]


# --- endpoints ----------------------------------------------------------------------


def test_an_endpoint_is_the_workload_that_istiod_makes_of_it() -> None:
    text = entry(
        (
            "name: api, namespace: shop",
            "name: api, namespace: shop, labels: {app: outside, version: v2}",
        ),
        (
            "{address: 198.51.100.7}",
            "{address: 198.51.100.7, ports: {http: 8081}, network: n2, locality: eu/eu-1/rack/x, "
            "weight: 5, serviceAccount: api, labels: {app: other}}",
        ),
    )
    found = translated(text, cluster=Cluster("east", "n1", "corp.example"))
    (one,) = found.state.workloads
    assert one.uid == "east/networking.istio.io/ServiceEntry/shop/api/198.51.100.7"
    assert (one.name, one.namespace, one.workload_name) == ("api", "shop", "api")
    assert (one.canonical_name, one.canonical_revision) == ("outside", "v2")
    assert one.addresses == (ip_address("198.51.100.7"),)
    assert (one.hostname, one.network, one.cluster_id) == ("", "n2", "east")
    assert str(one.identity) == "spiffe://corp.example/ns/shop/sa/api"
    assert one.locality == Locality("eu", "eu-1", "rack")
    assert (one.capacity, one.status) == (5, HealthStatus.HEALTHY)
    assert one.tunnel_protocol is TunnelProtocol.NONE
    assert one.services == {API: {80: 8081}}
    assert found.problems == ()


def test_an_endpoint_may_be_a_name_and_need_not_be_told_where_the_host_is_one() -> None:
    told_one = entry(("STATIC", "DNS"), ("198.51.100.7", "backend.example.net"))
    (one,) = translated(told_one).state.workloads
    assert (one.addresses, one.hostname) == ((), "backend.example.net")
    assert one.uid.endswith("/ServiceEntry/shop/api/backend.example.net")
    for resolution in ("DNS", "DNS_ROUND_ROBIN"):
        text = entry(
            ("STATIC\n      endpoints: [{address: 198.51.100.7}]", resolution),
            ("[api.example.com]", "[api.example.com, b.example.com]"),
        )
        one, other = translated(text).state.workloads
        assert (one.hostname, other.hostname) == ("api.example.com", "b.example.com")
        assert one.services == {API: {80: 8080}}
        assert other.services == {NamespacedHostname("shop", "b.example.com"): {80: 8080}}


def test_policies_and_the_tunnel_of_endpoints_are_by_their_owners_labels() -> None:
    policy = """\
    apiVersion: security.istio.io/v1
    kind: AuthorizationPolicy
    metadata: {name: p, namespace: shop}
    spec: {selector: {matchLabels: {app: api}}, action: DENY, rules: [{}]}
    """
    own = entry(
        ("198.51.100.7}", "198.51.100.7, labels: {app: api, networking.istio.io/tunnel: http}}")
    )
    (one,) = translated(policy, own).state.workloads
    assert (one.authorization_policies, one.native_tunnel) == ((), False)
    labels = "labels: {app: api, networking.istio.io/tunnel: http}"
    (one,) = translated(
        policy, entry(("namespace: shop", f"namespace: shop, {labels}"))
    ).state.workloads
    assert one.authorization_policies == ("shop/p",)
    assert (one.tunnel_protocol, one.native_tunnel) == (TunnelProtocol.HBONE, True)


def test_an_endpoint_that_is_listed_twice_counts_once_and_is_told() -> None:
    twice = entry(
        ("{address: 198.51.100.7}", "{address: 198.51.100.7}, {address: 198.51.100.7, weight: 2}")
    )
    found = translated(twice)
    assert [each.capacity for each in found.state.workloads] == [1]
    (line,) = told(found)
    assert "spec.endpoints[1].address: '198.51.100.7' is an endpoint before this one" in line


# --- selectors ----------------------------------------------------------------------


def test_a_selector_finds_pods_and_workload_entries_of_its_namespace() -> None:
    found = translated(SELECTING, POD, MACHINE)
    assert workload(found).services == {API: {80: 8080}}
    assert workload(found, "vm").services == {API: {80: 8080}}
    elsewhere = translated(
        entry(("namespace: shop", "namespace: bank"), text=SELECTING), POD, MACHINE
    )
    assert workload(elsewhere).services == workload(elsewhere, "vm").services == {}
    other = translated(entry(("app: web", "app: other"), text=SELECTING), POD, MACHINE)
    assert workload(other).services == {}
    assert endpoints(found) == []


def test_a_selected_pods_port_is_the_container_port_of_the_service_ports_name() -> None:
    named = entry(
        ("containers: []", "containers: [{ports: [{name: http, containerPort: 9090}]}]"), text=POD
    )
    assert workload(translated(SELECTING, named)).services == {API: {80: 9090}}
    # For a Kubernetes Service the name of its own port says nothing.
    assert list(workload(translated(SERVICE, named)).services.values()) == [{80: 8080}]


def test_a_workload_entrys_port_is_its_own_by_the_names_of_service_ports() -> None:
    ports = entry(
        ("serviceAccount: vm", "serviceAccount: vm, ports: {http: 9090, app: 7070}"), text=MACHINE
    )
    assert workload(translated(SELECTING, ports), "vm").services == {API: {80: 9090}}
    assert list(workload(translated(SERVICE, ports), "vm").services.values()) == [{80: 9090}]
    named = entry(("targetPort: 8080", "targetPort: app"), text=SERVICE)
    assert list(workload(translated(named, ports), "vm").services.values()) == [{80: 7070}]
    # Where the target has a name, one who has no such port does not serve it.
    assert list(workload(translated(named, MACHINE), "vm").services.values()) == [{}]


# --- workload entries ---------------------------------------------------------------


def test_a_workload_entry_is_the_workload_that_istiod_makes_of_it() -> None:
    found = translated(
        """
        apiVersion: networking.istio.io/v1beta1
        kind: WorkloadEntry
        metadata:
          name: vm-1
          namespace: shop
          labels: {app: front, istio.io/use-waypoint: egress}
        spec:
          address: fd00:6d62::9
          serviceAccount: vm
          network: n2
          locality: eu/eu-1
          weight: 3
          labels: {app: overruled, version: v3}
        """,
        GATEWAY,
        cluster=Cluster("east", "n1", "corp.example"),
    )
    one = workload(found, "vm-1")
    assert one.uid == "east/networking.istio.io/WorkloadEntry/shop/vm-1"
    assert one.addresses == (ip_address("fd00:6d62::9"),)
    assert (one.network, one.cluster_id, one.node) == ("n2", "east", "")
    assert str(one.identity) == "spiffe://corp.example/ns/shop/sa/vm"
    assert (one.canonical_name, one.canonical_revision) == ("front", "v3")
    assert (one.workload_name, one.workload_type) == ("vm-1", "pod")
    assert one.locality == Locality("eu", "eu-1", "")
    assert one.capacity == 3
    assert one.waypoint is not None
    assert one.tunnel_protocol is TunnelProtocol.NONE
    assert found.problems == ()


@pytest.mark.parametrize(
    ("about", "name"),
    [
        ("annotations: {istio.io/autoRegistrationGroup: group}, ", "group"),
        ("", "told"),
    ],
)
def test_a_workload_entry_is_called_by_its_group_or_label(about: str, name: str) -> None:
    label = f"{about}labels: {{service.istio.io/workload-name: told, "
    one = workload(translated(entry(("labels: {", label), text=MACHINE)), "vm")
    assert (one.workload_name, one.canonical_name) == (name, "web")


def test_a_workload_entry_speaks_hbone_when_its_own_labels_say_so() -> None:
    def of(change: str, *, live: bool = False) -> Workload:
        text = entry(("app: web", change), text=MACHINE)
        return workload(
            translated(NAMESPACE, text, cluster=LIVE) if live else translated(NAMESPACE, text), "vm"
        )

    native = of("networking.istio.io/tunnel: 'mtls,http'", live=True)
    assert (native.tunnel_protocol, native.native_tunnel) == (TunnelProtocol.HBONE, True)
    redirected = entry(
        ("labels:", "annotations: {ambient.istio.io/redirection: enabled}, labels:"), text=MACHINE
    )
    one = workload(translated(redirected, cluster=LIVE), "vm")
    assert (one.tunnel_protocol, one.native_tunnel) == (TunnelProtocol.HBONE, False)
    own = "istio.io/dataplane-mode: ambient"
    assert of(own).tunnel_protocol is TunnelProtocol.HBONE
    assert of(own, live=True).tunnel_protocol is TunnelProtocol.NONE
    # Its namespace's enrolment is the pods': nobody steers a machine.
    assert of("app: web").tunnel_protocol is TunnelProtocol.NONE


NAMESPACE = "{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: \
{istio.io/dataplane-mode: ambient}}}"


def test_a_workload_entry_may_be_a_name_or_without_an_address_in_another_network() -> None:
    named = entry(("198.51.100.9", "vm.example.net"), text=MACHINE)
    one = workload(translated(named), "vm")
    assert (one.addresses, one.hostname) == ((), "vm.example.net")
    far = entry(("address: 198.51.100.9", "network: far"), text=MACHINE)
    one = workload(translated(far), "vm")
    assert (one.addresses, one.hostname, one.network) == ((), "", "far")


def test_policies_select_workload_entries_by_all_their_labels() -> None:
    strict = """\
    apiVersion: security.istio.io/v1
    kind: PeerAuthentication
    metadata: {name: default, namespace: shop}
    spec: {mtls: {mode: STRICT}}
    """
    policy = """\
    apiVersion: security.istio.io/v1
    kind: AuthorizationPolicy
    metadata: {name: p, namespace: shop}
    spec: {selector: {matchLabels: {app: web, tier: front}}, rules: [{}]}
    """
    text = entry(
        ("serviceAccount: vm", "serviceAccount: vm, labels: {tier: front, app: x}"), text=MACHINE
    )
    one = workload(translated(strict, policy, text), "vm")
    assert one.authorization_policies == ("shop/p", "istio-system/istio_converted_static_strict")


# --- what is refused ------------------------------------------------------------------

ENDPOINTS = "endpoints: [{address: 198.51.100.7}]"
REFUSED = [
    (("hosts: [api.example.com]", "hosts: []"), "spec.hosts: must not be empty"),
    (("      hosts: [api.example.com]\n", ""), "spec.hosts: is missing"),
    (("[api.example.com]", "['*']"), "spec.hosts[0]: '*' is neither a host's name"),
    (("[api.example.com]", "['a..b']"), "spec.hosts[0]: 'a..b' is neither a host's name"),
    (("[api.example.com]", "[a.b, a.b]"), "spec.hosts[1]: 'a.b' is listed twice"),
    (("198.19.2.1", "198.19.2.x"), "spec.addresses[0]: '198.19.2.x' is not an IP address"),
    (("198.19.2.1", "198.19.2.1/33"), "spec.addresses[0]: '198.19.2.1/33' is neither"),
    (("number: 80", "number: 70000"), "spec.ports[0].number: 70000 is not between"),
    (("name: http, ", ""), "spec.ports[0].name: is missing"),
    (("targetPort: 8080", "targetPort: http"), "spec.ports[0].targetPort: expected a whole"),
    (("8080}]", "8080}, {number: 81, name: http}]"), "spec.ports[1].name: 'http' is another"),
    (("8080}]", "8080}, {number: 80, name: h}]"), "spec.ports[1].number: 80 is listed twice"),
    (("STATIC", "GUESS"), "spec.resolution: 'GUESS' is none of NONE, STATIC, DNS"),
    (("resolution:", "location: MARS\n      resolution:"), "spec.location: 'MARS' is none of"),
    (("STATIC", "NONE"), "spec.endpoints: the resolution NONE takes no endpoints"),
    (("198.51.100.7", "a.example.net"), "spec.endpoints[0].address: 'a.example.net' is no IP"),
    (("198.51.100.7", "unix:///run/x"), "spec.endpoints[0].address: a node proxy cannot"),
    (("address: 198.51.100.7", "weight: 1"), "spec.endpoints[0].address: is missing"),
    (("7}]", "7, ports: {grpc: 1}}]"), "spec.endpoints[0].ports: no port of the entry is called"),
    (("7}]", "7, serviceAccount: 'a b'}]"), "spec.endpoints[0].serviceAccount: 'a b' cannot be"),
    (("7}]", "7, serviceAcount: a}]"), "serviceAcount: unknown field; meant serviceAccount?"),
    (
        (ENDPOINTS, f"{ENDPOINTS}\n      workloadSelector: {{}}"),
        "spec.endpoints: cannot stand beside workloadSelector",
    ),
    (("endpoints:", "endpoint:"), "spec.endpoint: unknown field; meant endpoints?"),
]


@pytest.mark.parametrize(("change", "why"), REFUSED)
def test_a_bad_entry_is_refused_by_name_field_and_reason(change: tuple[str, str], why: str) -> None:
    found = translated(entry(change), POD)
    (line,) = told(found)
    assert line.startswith("mesh.yaml:1: ServiceEntry shop/api: ")
    assert why in line
    assert line.endswith("(its hosts are not in the mesh)")
    assert found.state.services == ()
    assert [each.name for each in found.state.workloads] == ["web-0"]
    assert [key.name for key in found.broken] == ["api"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            (("198.19.2.1", "198.19.2.0/24"),),
            "spec.addresses[0]: the resolution DNS takes no ranges of addresses",
        ),
        (
            ((ENDPOINTS, ""), ("[api.example.com]", "['*.example.com']")),
            "spec.hosts[0]: '*.example.com' cannot be looked up",
        ),
        (
            (
                ("resolution: DNS", "resolution: DNS_ROUND_ROBIN"),
                ("7}]", "7}, {address: 198.51.100.8}]"),
            ),
            "spec.endpoints: the resolution DNS_ROUND_ROBIN takes one endpoint at most",
        ),
        (
            ((ENDPOINTS, ""), ("resolution: DNS", "resolution: DYNAMIC_DNS")),
            "spec.hosts[0]: 'api.example.com': the resolution DYNAMIC_DNS is for wildcards",
        ),
        ((("198.51.100.7", "a_.b"),), "spec.endpoints[0].address: 'a_.b' is neither an IP address"),
    ],
)
def test_what_no_resolver_could_do_is_refused(
    changes: tuple[tuple[str, str], ...], why: str
) -> None:
    found = translated(entry(("STATIC", "DNS"), *changes))
    (line,) = told(found)
    assert why in line
    assert found.state.services == ()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("address: 198.51.100.9, ", ""), "spec.address: is missing: only an entry with a network"),
        (("198.51.100.9", "198.51.100.300"), "spec.address: '198.51.100.300' is neither"),
        (("198.51.100.9", "0.0.0.0"), "spec.address: '0.0.0.0' is no host's own address"),
        (("serviceAccount: vm", "weight: -1"), "spec.weight: -1 is not between"),
        (("serviceAccount: vm", "ports: {http: 0}"), "spec.ports[http]: 0 is not between"),
        (("serviceAccount: vm", "serviceAccount: '/'"), "spec.serviceAccount: '/' cannot be"),
        (("serviceAccount: vm", "labels: {a: 1}"), "spec.labels[a]: expected a text"),
        (("serviceAccount: vm", "adress: x"), "spec.adress: unknown field; meant address?"),
    ],
)
def test_a_bad_workload_entry_is_refused_by_name_field_and_reason(
    change: tuple[str, str], why: str
) -> None:
    found = translated(entry(change, text=MACHINE), POD)
    (line,) = told(found)
    assert line.startswith("mesh.yaml:1: WorkloadEntry shop/vm: ")
    assert why in line
    assert line.endswith("(it is not in the mesh)")
    assert [each.name for each in found.state.workloads] == ["web-0"]
