"""Whether a CONNECT asks for something that this waypoint serves, and for what."""

from __future__ import annotations

from meshbpf.agent.core.address import AddressError, SocketAddress
from meshbpf.agent.core.authority import parse_authority
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.route import INTERNAL_PORTS, Refused
from meshbpf.agent.core.service import Service
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.waypoint import is_waypoint
from meshbpf.agent.core.workload import Workload
from meshbpf.agent.l7.exchange import Destination
from meshbpf.agent.l7.plan import WaypointPlan


def admit(
    mesh: Snapshot, plan: WaypointPlan, own: Workload, peer: SpiffeId, authority: str
) -> Destination | Refused:
    """The destination of a CONNECT from `peer`. Refusals carry ztunnel's statuses.

    400: the authority is none, or the destination is not bound to this
    waypoint. 503: what it names is not in the mesh state, or has no such port.
    """
    try:
        wanted = parse_authority(authority)
    except AddressError as error:
        return Refused(error.what, "bad-authority", 400)
    if wanted.port in INTERNAL_PORTS:
        return Refused(f"port {wanted.port} belongs to the mesh itself", "internal-port")
    if not isinstance(wanted, SocketAddress):
        service = mesh.service_with_hostname(wanted.host, peer.namespace)
        if service is None:
            return Refused(f"no service has the hostname {wanted.host}", "unknown-host")
        return _service(plan, service, Destination(wanted, wanted.port, service))
    workload = mesh.workload_at(own.network, wanted.ip)
    if workload is not None:
        if workload.waypoint is None or not is_waypoint(mesh, own, workload.waypoint):
            return Refused(f"{workload} does not use this waypoint", "wrong-destination", 400)
        return Destination(wanted, wanted.port, None, workload, wanted)
    service = mesh.service_at(own.network, wanted.ip, peer.namespace)
    if service is None:
        return Refused(f"{wanted.ip} is not in the mesh state", "unknown-destination", 400)
    return _service(plan, service, Destination(wanted, wanted.port, service, None, wanted))


def _service(
    plan: WaypointPlan, service: Service, destination: Destination
) -> Destination | Refused:
    if service.key not in plan.services:
        return Refused(f"{service} does not use this waypoint", "wrong-destination", 400)
    if destination.port not in service.ports:
        return Refused(f"service {service} has no port {destination.port}", "unknown-port")
    return destination
