"""A small mesh and connections in it."""

from __future__ import annotations

from meshbpf.agent.core.address import SocketAddress
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.local_xds import parse_local_xds
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import Workload
from meshbpf.agent.runtime.connections import Direction, LiveConnection, Transport

MESH = """
workloads:
- uid: cluster1//v1/Pod/shop/web-0
  name: web-0
  namespace: shop
  serviceAccount: web
  workloadIps: ["198.18.1.1"]
  protocol: HBONE
  node: node1
  clusterId: cluster1
  workloadName: web
  workloadType: deployment
  canonicalName: web
  canonicalRevision: v1
  locality: {region: north, zone: n1, subzone: ""}
  authorizationPolicies: [shop/only-web]
  services: {}
- uid: cluster1//v1/Pod/stock/db-0
  name: db-0
  namespace: stock
  serviceAccount: db
  workloadIps: ["198.18.2.1", "fd00:6d62:2::1"]
  protocol: HBONE
  node: node2
  clusterId: cluster1
  workloadName: db
  workloadType: deployment
  canonicalName: db
  canonicalRevision: latest
  services:
    stock/db.stock.svc.cluster.local: {5432: 15432}
- uid: cluster1//v1/Pod/stock/bare
  name: bare
  namespace: stock
  workloadIps: ["198.18.2.2"]
  protocol: TCP
  services: {}
services:
- name: db
  namespace: stock
  hostname: db.stock.svc.cluster.local
  vips: ["/198.18.9.1"]
  ports: {5432: 15432}
policies:
- name: only-web
  namespace: shop
  scope: WorkloadSelector
  action: Allow
  dryRun: false
  rules:
  - - - principals: [{Exact: cluster.local/ns/shop/sa/web}]
        notNamespaces: [{Prefix: evil-}]
        serviceAccounts: [{namespace: shop, serviceAccount: web}]
        sourceIps: [198.18.1.0/24]
        destinationPorts: [80, 443]
      - notPrincipals: [{Presence: []}]
"""

SNAPSHOT = Snapshot.of(parse_local_xds(MESH, "mesh.yaml"), version=3)


def _workload(uid: str) -> Workload:
    found = SNAPSHOT.workload(uid)
    assert found is not None
    return found


WEB = _workload("cluster1//v1/Pod/shop/web-0")
DB = _workload("cluster1//v1/Pod/stock/db-0")
DB_SERVICE = SNAPSHOT.service("stock", "db.stock.svc.cluster.local")
assert DB_SERVICE is not None
WEB_ID = SpiffeId("cluster.local", "shop", "web")


def address(text: str) -> SocketAddress:
    return SocketAddress.parse(text)


def outbound(number: int = 1) -> LiveConnection:
    """web dials db's service; the tunnel goes to db's pod."""
    live = LiveConnection(
        id=number,
        pod=None,  # type: ignore[arg-type]  # nothing here asks for it
        direction=Direction.OUTBOUND,
        transport=Transport.HBONE,
        source=address("198.18.1.1:40000"),
        destination=address("198.18.9.1:5432"),
        opened_at=0.0,
        opened_monotonic=0.0,
    )
    live.source_workload, live.destination_workload = WEB, DB
    live.destination_service = DB_SERVICE
    live.source_identity = WEB_ID
    live.target = address("198.18.2.1:15432")
    live.tunnel_address = address("198.18.2.1:15008")
    return live


def inbound(number: int = 2) -> LiveConnection:
    """The same at the other end."""
    live = LiveConnection(
        id=number,
        pod=None,  # type: ignore[arg-type]
        direction=Direction.INBOUND,
        transport=Transport.HBONE,
        source=address("198.18.1.1:50000"),
        destination=address("198.18.2.1:15432"),
        opened_at=0.0,
        opened_monotonic=0.0,
    )
    live.source_workload, live.destination_workload = WEB, DB
    live.destination_service = DB_SERVICE
    live.source_identity = WEB_ID
    live.target = address("198.18.2.1:15432")
    live.tunnel_address = address("198.18.2.1:15008")
    return live


def plaintext(number: int = 3) -> LiveConnection:
    """Somebody outside the mesh dials db's pod."""
    live = LiveConnection(
        id=number,
        pod=None,  # type: ignore[arg-type]
        direction=Direction.INBOUND,
        transport=Transport.TCP,
        source=address("198.18.7.7:1234"),
        destination=address("198.18.2.1:15432"),
        opened_at=0.0,
        opened_monotonic=0.0,
    )
    live.destination_workload = DB
    live.target = address("198.18.2.1:15432")
    return live
