"""The answers of routing: where a connection goes, or why it does not."""

from __future__ import annotations

from dataclasses import dataclass

from meshbpf.agent.core.address import IPAddress, SocketAddress
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.service import Service
from meshbpf.agent.core.workload import HBONE_PORT, Workload

# Ports at which node proxies listen themselves (15008 is ours and theirs, the
# other two ztunnel's): nothing may be asked to forward to them.
INTERNAL_PORTS = frozenset({15001, 15006, HBONE_PORT})


@dataclass(frozen=True, slots=True)
class HboneRoute:
    """Tunnel to `gateway`, asking for `authority`; the peer must prove one of `expected`.

    `target` is the address that the authority names; `destination` the
    workload that answers at the gateway; `service` what the client addressed.
    """

    gateway: SocketAddress
    authority: str
    expected: frozenset[SpiffeId]
    destination: Workload
    service: Service | None
    target: SocketAddress


@dataclass(frozen=True, slots=True)
class PlainRoute:
    """Dial `target` without a tunnel; `destination` is None outside the mesh."""

    target: SocketAddress
    destination: Workload | None
    service: Service | None


@dataclass(frozen=True, slots=True)
class InboundRoute:
    """Dial the app at `target`; `service` is the one meant, where that is certain."""

    target: SocketAddress
    service: Service | None


@dataclass(frozen=True, slots=True)
class Refused:
    """No way: `code` for machines, `reason` for people, `status` for an HBONE client."""

    reason: str
    code: str
    status: int = 503


Route = HboneRoute | PlainRoute | Refused


def select_ip(workload: Workload, wanted: IPAddress, service: Service | None) -> IPAddress | None:
    """Which address of `workload` to dial for a client that dialed `wanted`.

    That very address if it is the workload's own; else one that the service's
    address families allow, of the client's family if there is one. None when
    the families rule out every address.
    """
    addresses = workload.addresses
    if len(addresses) == 1 and (service is None or service.any_family):
        return addresses[0]
    if wanted in addresses:
        return wanted
    if service is not None:
        addresses = tuple(ip for ip in addresses if service.accepts(ip))
    for ip in addresses:
        if ip.version == wanted.version:
            return ip
    return addresses[0] if addresses else None
