"""Which destinations' connections must enter the agent."""

from __future__ import annotations

from ipaddress import ip_network

from meshbpf.agent.core.address import IPNetwork
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import NetworkMode, TunnelProtocol


def mesh_prefixes(mesh: Snapshot, network: str | None = None) -> frozenset[IPNetwork]:
    """The destinations that the kernel must hand to the agent; all else is outside the mesh.

    Virtual addresses and ranges of all services, and the addresses of
    workloads that speak HBONE or stand behind a waypoint. Without `network`
    it is those of every network: too much is safe, since the agent passes on
    what it does not know; too little would send plaintext.
    """
    prefixes: set[IPNetwork] = set()
    for service in mesh.services:
        for address in service.addresses:
            if network is None or address.network == network:
                prefixes.add(ip_network(address.ip))
        for cidr in service.cidr_addresses:
            if network is None or cidr.network == network:
                prefixes.add(cidr.cidr)
    for workload in mesh.workloads:
        if workload.network_mode is NetworkMode.HOST_NETWORK:
            continue  # its address is its node's, and never found by address
        if network is not None and workload.network != network:
            continue
        if workload.tunnel_protocol is TunnelProtocol.HBONE or workload.waypoint is not None:
            prefixes.update(map(ip_network, workload.addresses))
    return frozenset(prefixes)
