"""LOCAL_XDS: what each key becomes."""

from __future__ import annotations

import pytest

from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.local_xds import MeshState, parse_local_xds
from meshbpf.agent.core.policy import (
    Authorization,
    Match,
    MatchKind,
    PolicyAction,
    PolicyScope,
    ServiceAccountMatch,
    StringMatch,
)
from meshbpf.agent.core.service import (
    HealthPolicy,
    IPFamilies,
    LoadBalancerMode,
    LoadBalancerScope,
    LoadBalancing,
    ServiceEndpoint,
    Visibility,
    WeightedWaypoint,
)
from meshbpf.agent.core.workload import (
    ApplicationTunnel,
    HealthStatus,
    Locality,
    NamespacedHostname,
    NetworkMode,
    TunnelFraming,
    TunnelProtocol,
)
from tests.unit.core.builders import gateway, ip

pytestmark = pytest.mark.compat


def read(text: str) -> MeshState:
    return parse_local_xds(text, "mesh.yaml")


FULL_WORKLOAD = """
workloads:
- uid: c1//Pod/shop/cart-1
  name: cart-1
  namespace: shop
  serviceAccount: cart
  trustDomain: example.org
  workloadIps: [10.0.0.1, "fd00:0:0::1", "::ffff:10.0.0.2"]
  protocol: HBONE
  network: net1
  networkMode: HostNetwork
  node: node-1
  waypoint: {destination: shop/wp.local, hboneMtlsPort: 15009}
  networkGateway: {destination: net2/10.7.0.1, hboneMtlsPort: 15010}
  applicationTunnel: {protocol: PROXY, port: 15088}
  nativeTunnel: true
  workloadName: cart
  workloadType: deployment
  canonicalName: cart
  canonicalRevision: v1
  hostname: cart-1.example
  authorizationPolicies: [shop/only-web]
  status: Unhealthy
  clusterId: c1
  locality: {region: r, zone: z, subzone: s}
  services:
    shop/cart.local: {80: 8080, "443": 8443}
    shop/wp.local: {}
  capacity: 7
- {name: gw, namespace: shop, workloadIps: [10.7.0.1], network: net2, services: {}}
services:
- {name: cart, namespace: shop, hostname: cart.local, vips: [], ports: {80: 0}}
- {name: wp, namespace: shop, hostname: wp.local, vips: [], ports: {15009: 15009}}
policies:
- name: only-web
  namespace: shop
  scope: WorkloadSelector
  action: Allow
  rules: []
  dryRun: false
"""


def test_every_key_of_a_workload() -> None:
    found, _gateway = read(FULL_WORKLOAD).workloads
    assert found.uid == "c1//Pod/shop/cart-1"
    assert (found.name, found.namespace) == ("cart-1", "shop")
    assert found.addresses == (ip("10.0.0.1"), ip("fd00::1"), ip("10.0.0.2"))
    assert found.identity == SpiffeId("example.org", "shop", "cart")
    assert found.tunnel_protocol is TunnelProtocol.HBONE
    assert (found.network, found.node, found.cluster_id) == ("net1", "node-1", "c1")
    assert found.network_mode is NetworkMode.HOST_NETWORK
    assert found.waypoint == gateway("shop/wp.local", 15009)
    assert found.network_gateway == gateway("net2/10.7.0.1", 15010)
    assert found.application_tunnel == ApplicationTunnel(TunnelFraming.PROXY, 15088)
    assert found.native_tunnel
    assert (found.workload_name, found.workload_type) == ("cart", "deployment")
    assert (found.canonical_name, found.canonical_revision) == ("cart", "v1")
    assert found.hostname == "cart-1.example"
    assert found.authorization_policies == ("shop/only-web",)
    assert found.status is HealthStatus.UNHEALTHY
    assert found.locality == Locality("r", "z", "s")
    assert found.services == {
        NamespacedHostname("shop", "cart.local"): {80: 8080, 443: 8443},
        NamespacedHostname("shop", "wp.local"): {},
    }
    assert found.capacity == 7


def test_missing_keys_of_a_workload_have_ztunnels_defaults() -> None:
    (found,) = read("workloads: [{name: a, namespace: ns, workloadIps: [10.0.0.1]}]").workloads
    assert str(found.identity) == "spiffe://cluster.local/ns/ns/sa/default"
    assert found.uid == "Kubernetes//Pod/ns/a"
    assert found.tunnel_protocol is TunnelProtocol.NONE
    assert found.network_mode is NetworkMode.STANDARD
    assert found.status is HealthStatus.HEALTHY
    assert found.cluster_id == "Kubernetes"
    assert found.capacity == 1
    assert found.services == {}
    assert found.network == ""


def test_every_key_of_a_service() -> None:
    (found,) = read("""
        workloads:
        - {uid: u, name: a, namespace: ns, workloadIps: [10.0.0.1]}
        services:
        - name: web
          namespace: ns
          hostname: web.local
          vips: [/10.9.0.1, "net/fd09::1"]
          cidrVips: [{network: net, cidr: 10.8.0.0/16}, {cidr: "fd08::1/32"}]
          ports: {80: 8080, 443: 0}
          endpoints:
            u: {workloadUid: u, port: {80: 9000}, status: Unhealthy}
          subjectAltNames: ["spiffe://cluster.local/ns/ns/sa/x"]
          waypoint: {destination: /10.0.0.1, hboneMtlsPort: 15008}
          weightedWaypoints:
          - {destination: {destination: ns/web.local, hboneMtlsPort: 80}, weight: 5}
          loadBalancer:
            {routingPreferences: [Network, Region, Zone, Subzone, Node, Cluster],
             mode: Failover, healthPolicy: AllowAll}
          ipFamilies: IPv6
          canonical: true
          visibility: Namespace
    """).services
    assert (found.name, found.namespace, found.hostname) == ("web", "ns", "web.local")
    assert [str(a) for a in found.addresses] == ["/10.9.0.1", "net/fd09::1"]
    assert [str(a) for a in found.cidr_addresses] == ["net/10.8.0.0/16", "/fd08::/32"]
    assert found.ports == {80: 8080, 443: 0}
    assert found.endpoints == (ServiceEndpoint("u", {80: 9000}, HealthStatus.UNHEALTHY),)
    assert found.subject_alt_names == (SpiffeId("cluster.local", "ns", "x"),)
    assert found.waypoint == gateway("/10.0.0.1")
    assert found.weighted_waypoints == (WeightedWaypoint(gateway("ns/web.local", 80), 5),)
    assert found.load_balancing == LoadBalancing(
        (
            LoadBalancerScope.NETWORK,
            LoadBalancerScope.REGION,
            LoadBalancerScope.ZONE,
            LoadBalancerScope.SUBZONE,
            LoadBalancerScope.NODE,
            LoadBalancerScope.CLUSTER,
        ),
        LoadBalancerMode.FAILOVER,
        HealthPolicy.ALLOW_ALL,
    )
    assert found.ip_families is IPFamilies.IPV6_ONLY
    assert found.canonical
    assert found.visibility is Visibility.NAMESPACE


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("Standard", LoadBalancerMode.UNSPECIFIED),
        ("Strict", LoadBalancerMode.STRICT),
        ("Failover", LoadBalancerMode.FAILOVER),
        ("Passthrough", LoadBalancerMode.PASSTHROUGH),
    ],
)
def test_load_balancer_modes(name: str, mode: LoadBalancerMode) -> None:
    (found,) = read(
        f"services: [{{name: a, namespace: n, hostname: h, ports: {{}}, "
        f"loadBalancer: {{mode: {name}}}}}]"
    ).services
    assert found.load_balancing == LoadBalancing(mode=mode)


def test_every_key_of_a_policy() -> None:
    (found,) = read("""
        policies:
        - name: p
          namespace: ns
          scope: Global
          action: Deny
          dryRun: true
          rules:
          - - - namespaces: [!Exact a, Prefix: b]
                notNamespaces: [{Suffix: c}]
                serviceAccounts: [{namespace: n, serviceAccount: s}]
                notServiceAccounts: [{namespace: n, serviceAccount: t}]
                principals: [!Presence []]
                notPrincipals: [!Prefix td/ns/, !Suffix /sa/x, {Presence: []}, !Presence ]
                sourceIps: [10.0.0.0/8, "fd00::/16", 10.0.0.1]
                notSourceIps: [10.1.2.3/16]
                destinationIps: [10.0.0.2/32]
                notDestinationIps: ["::1/128"]
                destinationPorts: [80, 443]
                notDestinationPorts: [22]
            - []
          - []
    """).policies
    presence = StringMatch(MatchKind.PRESENCE)
    match = found.rules[0][0][0]
    assert match.namespaces == (
        StringMatch(MatchKind.EXACT, "a"),
        StringMatch(MatchKind.PREFIX, "b"),
    )
    assert match.not_namespaces == (StringMatch(MatchKind.SUFFIX, "c"),)
    assert match.service_accounts == (ServiceAccountMatch("n", "s"),)
    assert match.not_service_accounts == (ServiceAccountMatch("n", "t"),)
    assert match.principals == (presence,)
    assert match.not_principals == (
        StringMatch(MatchKind.PREFIX, "td/ns/"),
        StringMatch(MatchKind.SUFFIX, "/sa/x"),
        presence,
        presence,
    )
    assert [str(n) for n in match.source_ips] == ["10.0.0.0/8", "fd00::/16", "10.0.0.1/32"]
    assert [str(n) for n in match.not_source_ips] == ["10.1.0.0/16"]
    assert [str(n) for n in match.destination_ips] == ["10.0.0.2/32"]
    assert [str(n) for n in match.not_destination_ips] == ["::1/128"]
    assert match.destination_ports == (80, 443)
    assert match.not_destination_ports == (22,)
    assert found == Authorization(
        "p",
        "ns",
        PolicyScope.GLOBAL,
        PolicyAction.DENY,
        rules=(((match,), ()), ()),
        dry_run=True,
    )


# What ztunnel's examples/localhost.yaml exercises, in its form and indentation.
LOCALHOST = """
# comment
workloads:
- uid: cluster1//v1/Pod/default/local
  name: local
  namespace: default
  serviceAccount: default
  workloadIps: ["127.0.0.1"]
  protocol: HBONE
  node: local
  network: ""
  services:
    "default/example.com":
      80: 8080
- uid: cluster1//v1/Pod/default/local-tcp
  name: local-tcp
  namespace: default
  serviceAccount: default
  workloadIps: ["127.0.0.2"]
  protocol: TCP
  node: local
  network: ""
  services:
    "default/example.com":
      80: 8080
policies:
  - action: Allow
    rules:
    - - - notDestinationPorts:
          - 9999
    name: deny-9999
    namespace: default
    scope: Namespace
    dryRun: false
services:
- name: local
  namespace: default
  hostname: example.com
  vips:
    - /127.10.0.1
    - remote/127.10.0.2
  ports:
    80: 8080
  subjectAltNames:
   - spiffe://cluster.local/ns/default/sa/local
  canonical: true
"""


def test_files_as_ztunnels_example_load() -> None:
    found = read(LOCALHOST)
    assert [w.name for w in found.workloads] == ["local", "local-tcp"]
    assert [str(a) for s in found.services for a in s.addresses] == [
        "/127.10.0.1",
        "remote/127.10.0.2",
    ]
    assert found.policies[0].rules == (((Match(not_destination_ports=(9999,)),),),)


def test_names_that_other_yaml_versions_take_for_something_else_stay_names() -> None:
    (found,) = read(
        "workloads: [{name: on, namespace: 0x1f, node: 1e3, serviceAccount: true,"
        " network: 012, workloadIps: []}]"
    ).workloads
    assert (found.name, found.namespace, found.node) == ("on", "0x1f", "1e3")
    assert (found.service_account, found.network) == ("true", "012")


def test_anchors_stand_for_what_they_name() -> None:
    found = read("""
        workloads:
        - {name: a, namespace: n, workloadIps: [], locality: &here {region: r}}
        - {name: b, namespace: n, workloadIps: [], locality: *here}
    """)
    assert found.workloads[0].locality == found.workloads[1].locality == Locality("r")


def test_json_is_yaml() -> None:
    found = read('{"services":[{"name":"a","namespace":"n","hostname":"h","ports":{"80":8080}}]}')
    assert found.services[0].ports == {80: 8080}


def test_an_empty_mesh_is_written_out() -> None:
    assert read("{}") == MeshState()
    assert read("workloads: []\nservices: []\npolicies: []\n") == MeshState()
