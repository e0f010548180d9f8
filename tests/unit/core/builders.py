"""Short ways to make the records that the tests of `core` need."""

from __future__ import annotations

import random
from collections.abc import Iterable
from ipaddress import ip_address, ip_network
from typing import Any

from meshbpf.agent.core.address import IPAddress, SocketAddress
from meshbpf.agent.core.policy import Authorization
from meshbpf.agent.core.service import NetworkCidr, Service
from meshbpf.agent.core.state import MeshState
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import (
    GatewayAddress,
    NamespacedHostname,
    NetworkAddress,
    TunnelProtocol,
    Workload,
)


def ip(text: str) -> IPAddress:
    return ip_address(text)


def at(text: str) -> SocketAddress:
    return SocketAddress.parse(text)


def pod(name: str, *addresses: str, services: Any = None, **fields: Any) -> Workload:
    """An HBONE pod of namespace `default` unless told otherwise.

    `services` is {"host": {80: 8080}} or {"ns/host": ...}.
    """
    namespace = fields.pop("namespace", "default")
    keyed = {}
    for text, ports in (services or {}).items():
        before, slash, host = text.rpartition("/")
        keyed[NamespacedHostname(before if slash else namespace, host)] = ports
    return Workload(
        uid=fields.pop("uid", f"c//Pod/{namespace}/{name}"),
        name=name,
        namespace=namespace,
        addresses=tuple(ip_address(text) for text in addresses),
        tunnel_protocol=fields.pop("tunnel_protocol", TunnelProtocol.HBONE),
        service_account=fields.pop("service_account", name),
        services=keyed,
        **fields,
    )


def plain(name: str, *addresses: str, **fields: Any) -> Workload:
    return pod(name, *addresses, tunnel_protocol=TunnelProtocol.NONE, **fields)


def service(host: str, *vips: str, **fields: Any) -> Service:
    """A service of namespace `default`; a vip may be an address, NET/ADDRESS or a CIDR."""
    addresses, cidrs = [], []
    for vip in vips:
        head, slash, tail = vip.partition("/")
        if slash and tail.isdigit():
            cidrs.append(NetworkCidr("", ip_network(vip)))
        else:
            addresses.append(NetworkAddress(head if slash else "", ip_address(tail or head)))
    return Service(
        name=fields.pop("name", host.partition(".")[0]),
        namespace=fields.pop("namespace", "default"),
        hostname=host,
        addresses=tuple(addresses),
        cidr_addresses=tuple(cidrs),
        ports=fields.pop("ports", {80: 8080}),
        **fields,
    )


def gateway(text: str, port: int = 15008) -> GatewayAddress:
    """NET/IP or NS/HOST."""
    before, _, after = text.partition("/")
    if after[0].isdigit() or ":" in after:
        return GatewayAddress(NetworkAddress(before, ip_address(after)), port)
    return GatewayAddress(NamespacedHostname(before, after), port)


def mesh(*records: Workload | Service | Authorization) -> Snapshot:
    return Snapshot.of(state(records))


def state(records: Iterable[Workload | Service | Authorization]) -> MeshState:
    records = tuple(records)
    return MeshState(
        tuple(r for r in records if isinstance(r, Workload)),
        tuple(r for r in records if isinstance(r, Service)),
        tuple(r for r in records if isinstance(r, Authorization)),
    )


def rng(seed: int = 1) -> random.Random:
    return random.Random(seed)
