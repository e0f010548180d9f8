"""One answer of each kind, with the values that a small mesh would give."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec

from meshbpf.agent import api

NOW = datetime(2026, 3, 14, 15, 9, 26, tzinfo=UTC)
# What a hostile name may carry: an escape sequence, a C1 control, a direction override.
HOSTILE = "evil\x1b[2J\x9b31m\u202egnp"

STATUS = api.StatusResult(
    ready=True,
    pending=(),
    agent_id="a3f0c9d2",
    node="node1",
    version="0.1.0",
    pid=4711,
    started_at=NOW - timedelta(hours=3, minutes=12),
    uptime_s=3 * 3600 + 12 * 60 + 5.5,
    trust_domain="cluster.local",
    network="",
    state=api.StateSourceInfo(
        kind="local-xds",
        origin="/etc/meshbpf/mesh.yaml",
        healthy=True,
        loaded_at=NOW - timedelta(minutes=7),
        version=3,
        workloads=8,
        services=2,
        policies=1,
    ),
    capture=api.CaptureInfo(
        requested="auto", in_force="connect+tc", reason="cgroup v2 alone at /sys/fs/cgroup"
    ),
    pods=api.PodCounts(attached=2, failed=0),
    heartbeat=api.HeartbeatInfo(beating=True, limit_s=0.5, lease_s=60.0, loop_lag_s=0.0031),
    connections=12,
    statistics={
        "steering": {"pods": 2, "prefixes": 9},
        "forwarder": {"opened": 120, "refused": 3, "handshake_s": 0.0125},
    },
)

STATUS_RELOADED = msgspec.structs.replace(
    STATUS,
    predecessors=(
        api.PredecessorInfo(pid=4710, connections=7, ends_at=NOW + timedelta(minutes=15)),
        api.PredecessorInfo(pid=4702, connections=1, ends_at=None),
    ),
)

RELOADED = api.ReloadResult(
    pid=4712, version="0.2.0", predecessor=4711, connections=12, took_s=1.412
)

STATUS_NOT_READY = api.StatusResult(
    ready=False,
    pending=("certificates", "mesh state"),
    agent_id="a3f0c9d2",
    node="node1",
    version="0.1.0",
    pid=4711,
    started_at=NOW,
    uptime_s=0.4,
    trust_domain="cluster.local",
    network="net-a",
    state=api.StateSourceInfo(
        kind="local-xds",
        origin="/etc/meshbpf/mesh.yaml",
        healthy=False,
        loaded_at=None,
        version=0,
        workloads=0,
        services=0,
        policies=0,
        error=api.ErrorBody(
            code="bad-local-xds",
            what="mesh.yaml:12: workloads[0].workloadIps[1]: '10.0.0.x' is not an IP address",
            hint="correct the file: it is read again by itself",
            exit_status=78,
        ),
    ),
    capture=api.CaptureInfo(
        requested="auto", in_force="tc", reason="no cgroup v2 is mounted: connect hooks cannot run"
    ),
    pods=api.PodCounts(attached=0, failed=1),
    heartbeat=api.HeartbeatInfo(beating=False, limit_s=0.5, lease_s=60.0, loop_lag_s=1.25),
    connections=0,
    warnings=("pod default/web could not be attached: netns pod-web is gone", HOSTILE),
)

POD = api.PodInfo(
    pod="default/web",
    namespace="default",
    name="web",
    state="attached",
    reason="",
    netns="/run/netns/pod-web",
    service_account="web",
    identity="spiffe://cluster.local/ns/default/sa/web",
    workload="cluster1//v1/Pod/default/web",
    addresses=("198.18.1.10", "fd00:6d62:1::10"),
    interfaces=("eth0",),
    on_agent_down="closed",
    exempt_ports=(22,),
    exempt_cidrs=("198.51.100.0/24",),
    exempt_interfaces=(),
    dns=True,
    attached_at=NOW - timedelta(hours=3),
    connections=7,
)

FAILED_POD = api.PodInfo(
    pod="shop/db-0",
    namespace="shop",
    name="db-0",
    state="failed",
    reason=f"netns pod-db is gone {HOSTILE}",
    netns="/run/netns/pod-db",
    service_account="",
    identity="",
    workload="",
    addresses=(),
    interfaces=(),
    on_agent_down="open",
    exempt_ports=(),
    exempt_cidrs=(),
    exempt_interfaces=(),
    dns=True,
    attached_at=None,
    connections=0,
)

PODS = api.PodsResult(pods=(POD, FAILED_POD))
NO_PODS = api.PodsResult(pods=())

POLICIES = api.PoliciesResult(
    policies=(
        api.PolicyInfo(
            namespace="default",
            name="allow-shop",
            action="ALLOW",
            scope="WORKLOAD_SELECTOR",
            dry_run=False,
            inexpressible="",
            workloads=2,
            rules=1,
            spec=((({"namespaces": [{"Exact": "shop"}], "destinationPorts": [80, 443]},),),),
        ),
        api.PolicyInfo(
            namespace="istio-system",
            name="no-plaintext",
            action="DENY",
            scope="GLOBAL",
            dry_run=True,
            inexpressible="",
            workloads=0,
            rules=1,
            spec=((({"notPrincipals": [{"Presence": []}]},),),),
        ),
        api.PolicyInfo(
            namespace="shop",
            name=HOSTILE,
            action="DENY",
            scope="NAMESPACE",
            dry_run=False,
            inexpressible="rules[0] has a match field of a later version",
            workloads=0,
            rules=0,
            spec=(),
        ),
    )
)

LOG = api.LogResult(
    level="info",
    scopes={"access": "debug", "pods": "warn"},
    known=("access", "app", "pods"),
    for_s=None,
)
LOG_FOR_A_TIME = api.LogResult(level="debug", scopes={}, known=("access",), for_s=300.0)

ATTACHED = api.AttachResult(outcome="attached", pod=POD)
UPDATED = api.AttachResult(outcome="updated", pod=POD)
UNCHANGED = api.AttachResult(outcome="unchanged", pod=POD)
DETACHED = api.DetachResult(outcome="detached", pod="default/web")
NOT_ATTACHED = api.DetachResult(outcome="not-attached", pod="default/web")

WORKLOADS = api.WorkloadsResult(
    workloads=(
        api.WorkloadInfo(
            uid="cluster1//v1/Pod/default/web",
            namespace="default",
            name="web",
            addresses=("198.18.1.10", "fd00:6d62:1::10"),
            identity="spiffe://cluster.local/ns/default/sa/web",
            protocol="HBONE",
            node="node1",
            network="",
            status="Healthy",
            services=("default/web.default.svc.cluster.local",),
            policies=("default/allow-shop",),
            attached=True,
        ),
        api.WorkloadInfo(
            uid="cluster1//v1/Pod/shop/legacy",
            namespace="shop",
            name=HOSTILE,
            addresses=("198.18.2.20",),
            identity="spiffe://cluster.local/ns/shop/sa/default",
            protocol="TCP",
            node="node2",
            network="",
            status="Healthy",
            services=(),
            policies=(),
            attached=False,
        ),
    )
)

SERVICES = api.ServicesResult(
    services=(
        api.ServiceInfo(
            namespace="default",
            name="web",
            hostname="web.default.svc.cluster.local",
            vips=("198.18.100.1", "fd00:6d62:100::1"),
            ports=(
                api.ServicePortInfo(port=80, target=8080),
                api.ServicePortInfo(port=443, target=443),
                api.ServicePortInfo(port=9000, target=0),
            ),
            endpoints=("cluster1//v1/Pod/default/web", "cluster1//v1/Pod/default/web2"),
        ),
        api.ServiceInfo(
            namespace="shop",
            name="db",
            hostname="db.shop.svc.cluster.local",
            vips=(),
            ports=(),
            endpoints=(),
        ),
    )
)

CERTS = api.CertsResult(
    certs=(
        api.CertInfo(
            identity="spiffe://cluster.local/ns/default/sa/web",
            state="valid",
            serial="5f2a77c01b",
            root="9c" * 32,
            not_before=NOW - timedelta(hours=2),
            not_after=NOW + timedelta(hours=22),
            renew_at=NOW + timedelta(hours=10),
            pods=("default/web", "default/web2"),
        ),
        api.CertInfo(
            identity="spiffe://cluster.local/ns/shop/sa/db",
            state="failed",
            serial="",
            root="",
            not_before=None,
            not_after=None,
            renew_at=None,
            pods=("shop/db-0",),
            error=api.ErrorBody(code="ca", what="the CA's chain ended an hour ago", exit_status=1),
        ),
        api.CertInfo(
            identity="spiffe://cluster.local/ns/shop/sa/old",
            state="expired",
            serial="01",
            root="",
            not_before=NOW - timedelta(hours=26),
            not_after=NOW - timedelta(hours=2),
            renew_at=NOW - timedelta(hours=14),
            pods=("shop/old",),
        ),
    ),
    roots=("9c" * 32,),
)

CONNECTIONS = api.ConnectionsResult(
    connections=(
        api.ConnectionInfo(
            id=17,
            direction="outbound",
            protocol="HBONE",
            pod="default/web",
            source="198.18.1.10:40112",
            destination="198.18.100.7:80",
            upstream="198.18.2.30:15008",
            peer_identity="spiffe://cluster.local/ns/shop/sa/db",
            service="shop/db.shop.svc.cluster.local",
            opened_at=NOW - timedelta(days=12, hours=3),
            age_s=12 * 86400 + 3 * 3600,
            bytes_sent=1536,
            bytes_received=5 * 1024**3,
        ),
        api.ConnectionInfo(
            id=21,
            direction="inbound",
            protocol="TCP",
            pod="shop/db-0",
            source="[fd00:6d62:9::9]:51000",
            destination="[fd00:6d62:2::30]:5432",
            upstream="[fd00:6d62:2::30]:5432",
            peer_identity="",
            service="",
            opened_at=NOW - timedelta(seconds=0.2),
            age_s=0.2,
            bytes_sent=0,
            bytes_received=999,
        ),
    ),
    total=2,
)
NO_CONNECTIONS = api.ConnectionsResult(connections=(), total=0)

VERSION = api.VersionResult(
    version="0.1.0",
    api_version="meshbpf/v1",
    agent_id="a3f0c9d2",
    python="3.11.2",
    kernel="6.1.0-28-amd64",
)

EXPLANATION = api.ExplainResult(
    source="Kubernetes//Pod/default/web-0",
    destination="198.51.100.1:80",
    outcome="denied",
    steps=(
        api.ExplainStep(stage="source", what="default/web-0, attached here", why=""),
        api.ExplainStep(stage="route", what="HBONE to 198.18.7.2:15008", why="it speaks HBONE"),
        api.ExplainStep(stage="policy", what="denied", why="DENY policy default/no matches"),
    ),
)
