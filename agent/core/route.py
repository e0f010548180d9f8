"""The answers of routing: where a connection goes, or why it does not."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from types import MappingProxyType

from meshbpf.agent.core.address import IPAddress, SocketAddress
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.service import Service
from meshbpf.agent.core.workload import HBONE_PORT, Workload

# Ports at which node proxies listen themselves (15008 is ours and theirs, the
# other two ztunnel's): nothing may be asked to forward to them.
INTERNAL_PORTS = frozenset({15001, 15006, HBONE_PORT})
_LOOPBACKS: dict[int, IPAddress] = {4: IPv4Address("127.0.0.1"), 6: IPv6Address("::1")}

Names = Mapping[str, Sequence[IPAddress]]
"""Addresses of hostnames that were looked up."""
NO_NAMES: Names = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class HboneRoute:
    """Tunnel to `gateway`, asking for `authority`; the peer must prove one of `expected`.

    `target` is the address that the authority names (that the client dialed,
    where it names a service); `destination` the workload that answers at the
    gateway; `service` what the client addressed. With `inner` the gateway is
    another network's: it passes on the bytes of the stream, in which there is
    a second tunnel for the same authority, to whoever proves one of `inner`.
    """

    gateway: SocketAddress
    authority: str
    expected: frozenset[SpiffeId]
    destination: Workload
    service: Service | None
    target: SocketAddress
    inner: frozenset[SpiffeId] | None = None


@dataclass(frozen=True, slots=True)
class PlainRoute:
    """Dial `target` without a tunnel; `destination` is None outside the mesh."""

    target: SocketAddress
    destination: Workload | None
    service: Service | None


@dataclass(frozen=True, slots=True)
class InboundRoute:
    """Dial the app at `dialed`; `service` is the one meant, where that is certain.

    `target` is what policy judges: the pod's address and the app's port. With
    `proxied` the app takes its connections over loopback alone, each behind a
    PROXY header that names the client and the address that it wanted.
    """

    target: SocketAddress
    service: Service | None
    proxied: SocketAddress | None = None

    @property
    def dialed(self) -> SocketAddress:
        """Where the app listens."""
        if self.proxied is None:
            return self.target
        # So nobody can reach the app's tunnel port past its proxy, and forge a header.
        return SocketAddress(_LOOPBACKS[self.target.ip.version], self.target.port)


@dataclass(frozen=True, slots=True)
class Refused:
    """No way: `code` for machines, `reason` for people, `status` for an HBONE client.

    `unresolved` is a hostname that the way leads through: whoever can look it
    up does so and asks again.
    """

    reason: str
    code: str
    status: int = 503
    unresolved: str = ""


Route = HboneRoute | PlainRoute | Refused


@dataclass(frozen=True, slots=True)
class Lookup:
    """What choosing an address may need beside the mesh: names that were looked up, and chance."""

    names: Names
    rng: random.Random


def select_ip(
    workload: Workload, wanted: IPAddress, service: Service | None, lookup: Lookup
) -> IPAddress | Refused:
    """Which address of `workload` to dial for a client that dialed `wanted`.

    That very address if it is the workload's own; else one that the service's
    address families allow, of the client's family if there is one. A workload
    that has no usable address but a hostname is dialed at an address of that,
    by the same preference; several share its connections.
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
    if addresses:
        return addresses[0]
    if not workload.hostname:
        return Refused(f"{workload} has no address of a usable family", "no-address")
    found = lookup.names.get(workload.hostname)
    if not found:
        return Refused(
            f"{workload} is known by its hostname {workload.hostname} alone, which has no address",
            "no-address",
            unresolved="" if workload.hostname in lookup.names else workload.hostname,
        )
    same = [ip for ip in found if ip.version == wanted.version]
    return lookup.rng.choice(same or found)
