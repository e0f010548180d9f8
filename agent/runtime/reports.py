"""What the agent says of its mesh and its connections, in the API's terms.

Pure translations: a record of the agent's in, a Struct of `agent/api.py` out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

from meshbpf.agent.api import (
    ConnectionInfo,
    ConnectionsRequest,
    ConnectionsResult,
    HeartbeatInfo,
    PodInfo,
    ServiceInfo,
    ServicePortInfo,
    ServicesResult,
    StateSourceInfo,
    WorkloadInfo,
    WorkloadsResult,
)
from meshbpf.agent.config import Settings
from meshbpf.agent.core.service import Service
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import TunnelProtocol, Workload
from meshbpf.agent.runtime.connections import ConnectionRecord
from meshbpf.agent.runtime.control import error_body
from meshbpf.agent.runtime.heartbeat import Heartbeat
from meshbpf.agent.runtime.mesh_source import MeshSource
from meshbpf.agent.runtime.pod import Pod


def pod_info(pod: Pod, mesh: Snapshot, connections: int) -> PodInfo:
    """One pod, with the workload that the mesh state has for it, if any."""
    attachment, kernel = pod.attachment, pod.kernel
    name = attachment.name
    workload = pod.local.workload(mesh) if pod.local else None
    return PodInfo(
        pod=pod.key,
        namespace=name.namespace,
        name=name.name,
        state=pod.state,
        reason=pod.reason,
        netns=attachment.netns,
        service_account=attachment.service_account,
        identity=str(pod.identity),
        workload=workload.uid if workload else "",
        addresses=_addresses(pod),
        interfaces=tuple(kernel.interfaces) if kernel else (),
        on_agent_down=attachment.on_agent_down,
        exempt_ports=attachment.exempt_ports,
        exempt_cidrs=attachment.exempt_cidrs,
        exempt_interfaces=attachment.exempt_interfaces,
        dns=attachment.dns,
        attached_at=attachment.attached_at,
        connections=connections,
        by_name=attachment.by_name,
        sandbox=attachment.sandbox,
        uid=attachment.uid,
        cgroup=attachment.cgroup,
        same_node="kernel" if kernel is not None and kernel.same_node else "hbone",
    )


def _addresses(pod: Pod) -> tuple[str, ...]:
    if pod.kernel is not None:
        return tuple(map(str, pod.kernel.addresses))
    return tuple(sorted(map(str, pod.local.addresses))) if pod.local else ()


def workloads(mesh: Snapshot, attached: frozenset[str]) -> WorkloadsResult:
    """All workloads; `attached` names the pods of this agent as NS/NAME."""
    ordered = sorted(mesh.workloads, key=lambda one: (one.namespace, one.name, one.uid))
    return WorkloadsResult(
        workloads=tuple(
            WorkloadInfo(
                uid=one.uid,
                namespace=one.namespace,
                name=one.name,
                addresses=tuple(map(str, one.addresses)),
                identity=str(one.identity),
                protocol=_protocol(one),
                node=one.node,
                network=one.network,
                status=str(one.status),
                services=tuple(sorted(map(str, one.services))),
                policies=one.authorization_policies,
                attached=f"{one.namespace}/{one.name}" in attached,
            )
            for one in ordered
        )
    )


def services(mesh: Snapshot) -> ServicesResult:
    """All services, each with the endpoints that may be taken."""
    ordered = sorted(mesh.services, key=lambda one: (one.namespace, one.hostname))
    return ServicesResult(services=tuple(_service(one, mesh) for one in ordered))


def connections(
    request: ConnectionsRequest,
    records: Sequence[ConnectionRecord],
    kernel: Sequence[ConnectionInfo] = (),
) -> ConnectionsResult:
    """The connections that `request` selects: the agent's, oldest first, then the kernel's."""
    found = (*map(_connection, records), *kernel)
    selected = [
        one
        for one in found
        if request.pod in (None, one.pod)
        if request.direction in (None, one.direction)
    ]
    return ConnectionsResult(
        connections=tuple(selected[: max(0, request.limit)]),
        total=len(selected),
    )


def connections_by_pod(records: Sequence[ConnectionRecord]) -> dict[str, int]:
    """How many each pod has, by NS/NAME; 0 for those it does not name."""
    counts: dict[str, int] = defaultdict(int)
    for record in records:
        counts[record.pod] += 1
    return counts


def _protocol(workload: Workload) -> Literal["HBONE", "TCP"]:
    return "HBONE" if workload.tunnel_protocol is TunnelProtocol.HBONE else "TCP"


def _service(service: Service, mesh: Snapshot) -> ServiceInfo:
    return ServiceInfo(
        namespace=service.namespace,
        name=service.name,
        hostname=service.hostname,
        vips=(
            *(str(address.ip) for address in service.addresses),
            *(str(network.cidr) for network in service.cidr_addresses),
        ),
        ports=tuple(
            ServicePortInfo(port=port, target=target)
            for port, target in sorted(service.ports.items())
        ),
        endpoints=tuple(sorted(endpoint.workload.uid for endpoint in mesh.endpoints(service))),
    )


def _connection(record: ConnectionRecord) -> ConnectionInfo:
    peer = record.peer_identity
    return ConnectionInfo(
        id=record.id,
        direction=record.direction.value,
        protocol=record.transport.value,
        pod=record.pod,
        source=str(record.source),
        destination=str(record.destination),
        upstream=str(record.upstream) if record.upstream else "",
        peer_identity=str(peer) if peer else "",
        service=record.service,
        opened_at=datetime.fromtimestamp(record.opened_at, UTC),
        age_s=round(record.age_s, 3),
        bytes_sent=record.bytes_sent,
        bytes_received=record.bytes_received,
    )


def state_info(mesh: Snapshot, source: MeshSource) -> StateSourceInfo:
    """Where the mesh state comes from, and what it holds."""
    return StateSourceInfo(
        kind=source.kind,
        origin=source.origin,
        healthy=source.healthy,
        loaded_at=source.loaded_at,
        version=mesh.version,
        workloads=len(mesh.workloads),
        services=len(mesh.services),
        policies=len(mesh.policies),
        error=error_body(source.error) if source.error else None,
    )


def heartbeat_info(settings: Settings, heartbeat: Heartbeat | None) -> HeartbeatInfo:
    """Whether the kernel is told that the agent lives."""
    return HeartbeatInfo(
        beating=heartbeat is not None and heartbeat.beating,
        limit_s=settings.heartbeat_limit_s,
        lease_s=settings.lease_s,
        loop_lag_s=heartbeat.statistics().loop_lag_s if heartbeat else 0.0,
    )
