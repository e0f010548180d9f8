"""GET /config_dump: all that the agent works with, in the shape of ztunnel's.

`istioctl ztunnel-config workload|service|policy|certificate|connections` reads
it: camelCase keys, ztunnel's spellings of enumerations, PEM in base64, serial
numbers in decimal, defaults left out where ztunnel leaves them out. Private
keys are not in it; there is nothing here that must stay secret from root.

Pure: records in, plain objects for the JSON encoder out. For a large mesh it
takes seconds, so it runs in a thread, over a snapshot that never changes.
"""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from meshbpf.agent.api import PodInfo
from meshbpf.agent.config import Exemptions, Settings
from meshbpf.agent.core.policy import Authorization, Match, MatchKind, StringMatch
from meshbpf.agent.core.service import (
    HealthPolicy,
    IPFamilies,
    LoadBalancerMode,
    Service,
    Visibility,
)
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import (
    ApplicationTunnel,
    GatewayAddress,
    HealthStatus,
    Locality,
    NetworkMode,
    TunnelProtocol,
    Workload,
)
from meshbpf.agent.runtime.certs import HeldCertificate
from meshbpf.agent.runtime.connections import ConnectionRecord, Direction, Transport

Json = dict[str, Any]

_MODES = {
    LoadBalancerMode.UNSPECIFIED: "Standard",
    LoadBalancerMode.STRICT: "Strict",
    LoadBalancerMode.FAILOVER: "Failover",
    LoadBalancerMode.PASSTHROUGH: "Passthrough",
}
_HEALTH_POLICIES = {HealthPolicy.ONLY_HEALTHY: "OnlyHealthy", HealthPolicy.ALLOW_ALL: "AllowAll"}
_FAMILIES = {
    IPFamilies.IPV4_ONLY: "IPv4",
    IPFamilies.IPV6_ONLY: "IPv6",
    IPFamilies.DUAL: "Dual",
}
_NETWORK_MODES = {NetworkMode.STANDARD: "Standard", NetworkMode.HOST_NETWORK: "HostNetwork"}


def dump(
    *,
    mesh: Snapshot,
    settings: Settings,
    version: Mapping[str, str],
    static: Json,
    certificates: Sequence[HeldCertificate],
    roots_pem: bytes,
    pods: Iterable[PodInfo],
    connections: Iterable[ConnectionRecord],
) -> Json:
    """The whole document; `static` is the mesh file as it was written, if there is one."""
    of_pod: dict[str, list[ConnectionRecord]] = defaultdict(list)
    for record in connections:
        of_pod[record.pod].append(record)
    roots = [_certificate(root) for root in x509.load_pem_x509_certificates(roots_pem)]
    return {
        "workloads": [workload(one) for one in sorted(mesh.workloads, key=lambda w: w.uid)],
        "services": [
            service(one, mesh)
            for one in sorted(mesh.services, key=lambda s: (s.hostname, s.namespace))
        ],
        "policies": [policy(one) for one in sorted(mesh.policies, key=lambda p: p.key)],
        "stagedServices": _staged(mesh),
        "staticConfig": {"workloads": [], "policies": [], "services": []} | static,
        "version": dict(version),
        "config": _settings(settings),
        "certificates": [
            _held(one, roots) for one in sorted(certificates, key=lambda held: held.identity)
        ],
        "workloadState": {
            pod.workload or pod.pod: _pod(pod, of_pod.get(pod.pod, [])) for pod in pods
        },
    }


def workload(one: Workload) -> Json:
    """A workload; keys whose value is the default are left out where ztunnel does so."""
    found: Json = {"workloadIps": [str(ip) for ip in one.addresses]}
    _put(found, "waypoint", one.waypoint and _gateway(one.waypoint))
    _put(found, "networkGateway", one.network_gateway and _gateway(one.network_gateway))
    found["protocol"] = "HBONE" if one.tunnel_protocol is TunnelProtocol.HBONE else "TCP"
    found["networkMode"] = _NETWORK_MODES[one.network_mode]
    _put(found, "uid", one.uid)
    found["name"] = one.name
    found["namespace"] = one.namespace
    _put(found, "trustDomain", one.trust_domain)
    _put(found, "serviceAccount", one.service_account)
    _put(found, "network", one.network)
    _put(found, "workloadName", one.workload_name)
    _put(found, "workloadType", one.workload_type.lower())
    _put(found, "canonicalName", one.canonical_name)
    _put(found, "canonicalRevision", one.canonical_revision)
    _put(found, "hostname", one.hostname)
    _put(found, "node", one.node)
    _put(found, "nativeTunnel", one.native_tunnel)
    _put(found, "applicationTunnel", one.application_tunnel and _tunnel(one.application_tunnel))
    _put(found, "authorizationPolicies", list(one.authorization_policies))
    found["status"] = _status(one.status)
    found["clusterId"] = one.cluster_id
    if one.locality != Locality():
        place = one.locality
        found["locality"] = {"region": place.region, "zone": place.zone, "subzone": place.subzone}
    _put(found, "services", sorted(map(str, one.services)))
    found["capacity"] = one.capacity
    return found


def service(one: Service, mesh: Snapshot) -> Json:
    """A service with the endpoints that may be taken."""
    found: Json = {
        "name": one.name,
        "namespace": one.namespace,
        "hostname": one.hostname,
        "vips": [str(address) for address in one.addresses],
    }
    _put(
        found,
        "cidrVips",
        [{"network": each.network, "cidr": str(each.cidr)} for each in one.cidr_addresses],
    )
    found["ports"] = _ports(one.ports)
    found["endpoints"] = {
        endpoint.workload.uid: {
            "workloadUid": endpoint.workload.uid,
            "port": _ports(endpoint.ports),
            "status": _status(endpoint.workload.status),
        }
        for endpoint in mesh.endpoints(one)
    }
    found["subjectAltNames"] = [str(name) for name in one.subject_alt_names]
    _put(found, "waypoint", one.waypoint and _gateway(one.waypoint))
    _put(
        found,
        "weightedWaypoints",
        [
            {"destination": _gateway(each.destination), "weight": each.weight}
            for each in one.weighted_waypoints
        ],
    )
    if one.load_balancing is not None:
        found["loadBalancer"] = {
            "routingPreferences": [
                scope.value.capitalize() for scope in one.load_balancing.routing_preference
            ],
            "mode": _MODES[one.load_balancing.mode],
            "healthPolicy": _HEALTH_POLICIES[one.load_balancing.health_policy],
        }
    _put(found, "ipFamilies", _FAMILIES.get(one.ip_families))
    found["canonical"] = one.canonical
    found["visibility"] = "Namespace" if one.visibility is Visibility.NAMESPACE else "Public"
    return found


def policy(one: Authorization) -> Json:
    """A policy; rules, clauses and matches nest as lists."""
    return {
        "name": one.name,
        "namespace": one.namespace,
        "scope": "".join(part.capitalize() for part in one.scope.value.split("_")),
        "action": one.action.value.capitalize(),
        "rules": [[[_match(match) for match in clause] for clause in rule] for rule in one.rules],
        "dryRun": one.dry_run,
    }


def _match(one: Match) -> Json:
    found: Json = {}
    for item in fields(one):
        values = getattr(one, item.name)
        if not values:
            continue
        head, *rest = item.name.split("_")
        key = head + "".join(part.capitalize() for part in rest)
        found[key] = [_matched(value) for value in values]
    return found


def _matched(value: Any) -> Any:
    if isinstance(value, StringMatch):
        if value.kind is MatchKind.PRESENCE:
            return {"Presence": []}
        return {value.kind.value.capitalize(): value.value}
    if isinstance(value, int):
        return value
    if hasattr(value, "service_account"):
        return {"namespace": value.namespace, "serviceAccount": value.service_account}
    return str(value)


def _staged(mesh: Snapshot) -> Json:
    """Endpoints that workloads name for services which are not there (yet)."""
    found: dict[str, Json] = defaultdict(dict)
    for one in mesh.workloads:
        for key, ports in one.services.items():
            if mesh.service(key.namespace, key.hostname) is None:
                found[str(key)][one.uid] = {
                    "workloadUid": one.uid,
                    "port": _ports(ports),
                    "status": _status(one.status),
                }
    return dict(found)


def _pod(pod: PodInfo, connections: Iterable[ConnectionRecord]) -> Json:
    inbound: list[Json] = []
    outbound: list[Json] = []
    for one in connections:
        if one.direction is Direction.INBOUND:
            inbound.append(
                {
                    "src": str(one.source),
                    "originalDst": one.service.partition("/")[2] or None,
                    "actualDst": str(one.destination),
                    "protocol": one.transport.value,
                }
            )
        else:
            outbound.append(
                {
                    "src": str(one.source),
                    "originalDst": str(one.destination),
                    "actualDst": str(one.upstream or one.destination),
                    "protocol": "HBONE" if one.transport is Transport.HBONE else "TCP",
                }
            )
    found: Json = {"state": "Up" if pod.state == "attached" else "Pending"}
    if pod.state == "attached":
        found["connections"] = {"inbound": inbound, "outbound": outbound}
    found["info"] = {
        "name": pod.name,
        "namespace": pod.namespace,
        "serviceAccount": pod.service_account,
    }
    return found


def _held(held: HeldCertificate, roots: list[Json]) -> Json:
    if held.chain_pem:
        chain = x509.load_pem_x509_certificates(held.chain_pem)
        return {
            "identity": held.identity,
            "state": "Available",
            "certChain": [_certificate(one) for one in chain],
            "rootCerts": roots,
        }
    state = f"Unavailable: {held.error}" if held.error else "Initializing"
    return {"identity": held.identity, "state": state, "certChain": [], "rootCerts": []}


def _certificate(one: x509.Certificate) -> Json:
    return {
        "pem": base64.b64encode(one.public_bytes(Encoding.PEM)).decode("ascii"),
        "serialNumber": str(one.serial_number),
        "validFrom": _time(one.not_valid_before_utc),
        "expirationTime": _time(one.not_valid_after_utc),
    }


def _settings(settings: Settings) -> Json:
    found = {
        item.name: _setting(getattr(settings, item.name))
        for item in fields(settings)
        if item.name != "origins"
    }
    camel = {}
    for name, value in found.items():
        head, *rest = name.split("_")
        camel[head + "".join(part.capitalize() for part in rest)] = value
    return camel


def _setting(value: object) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Exemptions):
        return {
            "ports": sorted(value.ports),
            "cidrs": [str(cidr) for cidr in value.cidrs],
            "interfaces": sorted(value.interfaces),
        }
    if isinstance(value, tuple | frozenset):
        return sorted(map(str, value))
    return str(value)


def _gateway(one: GatewayAddress) -> Json:
    return {"destination": str(one.destination), "hboneMtlsPort": one.hbone_mtls_port}


def _tunnel(one: ApplicationTunnel) -> Json:
    return {"protocol": one.protocol.value, "port": one.port}


def _ports(ports: Mapping[int, int]) -> dict[str, int]:
    return {str(port): ports[port] for port in sorted(ports)}


def _status(status: HealthStatus) -> str:
    return "Healthy" if status is HealthStatus.HEALTHY else "Unhealthy"


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _put(found: Json, key: str, value: object) -> None:
    if value:
        found[key] = value
