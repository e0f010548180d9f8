"""Outbound routing once more, slowly and plainly: the model that the real one is held against.

Written from the rules, not from the code: linear scans, no index, no memo, no
early answer. Where chance decides, every outcome that it could bring is
returned. What is shared with the code under test are the records alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meshbpf.agent.core.address import IPAddress, SocketAddress
from meshbpf.agent.core.service import (
    HealthPolicy,
    IPFamilies,
    LoadBalancerMode,
    LoadBalancerScope,
    Service,
    Visibility,
)
from meshbpf.agent.core.workload import (
    GatewayAddress,
    HealthStatus,
    NamespacedHostname,
    NetworkAddress,
    NetworkMode,
    TunnelProtocol,
    Workload,
)

Outcome = tuple[Any, ...]
"""("refused", code), ("plain", target, uid) or ("hbone", gateway, authority, SANs, inner, uid)."""


@dataclass
class Model:
    workloads: Sequence[Workload]
    services: Sequence[Service]
    names: Mapping[str, Sequence[IPAddress]]

    # --- look-ups

    def workload_at(self, network: str, ip: IPAddress) -> Workload | None:
        claims = [
            w
            for w in self.workloads
            if w.network == network
            and ip in w.addresses
            and w.network_mode is not NetworkMode.HOST_NETWORK
        ]
        claims.sort(
            key=lambda w: ("//Pod/" in w.uid, w.tunnel_protocol is TunnelProtocol.HBONE),
            reverse=True,
        )
        return claims[0] if claims else None

    def service_at(self, network: str, ip: IPAddress, client: str) -> Service | None:
        """Exact addresses before ranges; then own namespace, longest prefix, canonical, first."""
        ranked: list[tuple[Any, Service]] = []
        for order, service in enumerate(self.services):
            own = service.namespace == client
            if service.visibility is Visibility.NAMESPACE and not own:
                continue
            for address in service.addresses:
                if (address.network, address.ip) == (network, ip):
                    ranked.append(((1, own, 0, service.canonical, -order), service))
            for each in service.cidr_addresses:
                if each.network == network and ip in each.cidr:
                    key = (0, own, each.cidr.prefixlen, service.canonical, -order)
                    ranked.append((key, service))
        return max(ranked, key=lambda pair: pair[0])[1] if ranked else None

    def named(self, gateway: GatewayAddress, client: str) -> Service | Workload | None:
        place = gateway.destination
        if isinstance(place, NetworkAddress):
            return self.service_at(place.network, place.ip, client) or self.workload_at(
                place.network, place.ip
            )
        for service in self.services:
            if service.key == place:
                return service
        for workload in self.workloads:
            own = NamespacedHostname(workload.namespace, workload.hostname)
            if workload.hostname and own == place:
                return workload
        return None

    def endpoints(self, service: Service) -> Iterator[tuple[Workload, Mapping[int, int]]]:
        for workload in self.workloads:
            if service.key in workload.services:
                balancing = service.load_balancing
                all_of_them = balancing and balancing.health_policy is HealthPolicy.ALLOW_ALL
                if workload.status is HealthStatus.HEALTHY or all_of_them:
                    yield workload, workload.services[service.key]

    def is_waypoint(self, source: Workload, gateway: GatewayAddress) -> bool:
        found = self.named(gateway, source.namespace)
        if isinstance(found, Service):
            return source.uid in {w.uid for w, _ in self.endpoints(found)}
        return found is not None and found.uid == source.uid

    # --- choices

    def candidates(
        self, source: Workload, service: Service, port: int, purpose: str
    ) -> list[tuple[Workload, int | None]]:
        usable = []
        for workload, ports in self.endpoints(service):
            if workload.network != source.network and purpose != "gateway":
                if workload.network_gateway is None:
                    continue
            elif not workload.addresses and not workload.hostname:
                continue
            wanted = service.ports.get(port)
            if purpose == "waypoint":
                if wanted is None and workload.application_tunnel is None:
                    continue
            elif wanted is None or (wanted == 0 and port not in ports):
                continue
            target = ports.get(port) or wanted or None
            if target is None and workload.application_tunnel is not None:
                target = port if workload.application_tunnel.port else None
            usable.append((workload, target))
        balancing = service.load_balancing
        if balancing and balancing.mode is not LoadBalancerMode.UNSPECIFIED and usable:
            ranks = [rank(balancing.routing_preference, source, w) for w, _ in usable]
            if balancing.mode is LoadBalancerMode.STRICT:
                full = len(balancing.routing_preference)
                kept = [(sum(r), u) for r, u in zip(ranks, usable, strict=True) if r[0] == full]
            else:
                kept = [(sum(r), u) for r, u in zip(ranks, usable, strict=True)]
            best = max((r for r, _ in kept), default=0)
            usable = [u for r, u in kept if r == best]
        return [u for u in usable if u[0].capacity > 0]

    def addresses(
        self, workload: Workload, wanted: IPAddress, service: Service | None
    ) -> list[IPAddress]:
        if wanted in workload.addresses:
            return [wanted]
        own = [ip for ip in workload.addresses if service is None or accepts(service, ip)]
        for ip in own:
            if ip.version == wanted.version:
                return [ip]
        if own:
            return own[:1]
        found = list(self.names.get(workload.hostname, ())) if workload.hostname else []
        return [ip for ip in found if ip.version == wanted.version] or found

    # --- the decision

    def outcomes(self, source: Workload, target: SocketAddress) -> set[Outcome]:
        if target.ip.is_loopback or target.ip.is_unspecified:
            return {("refused", "loopback")}
        workload = self.workload_at(source.network, target.ip)
        service = self.service_at(source.network, target.ip, source.namespace)
        addressed = service if workload is None else None
        if addressed is not None:
            every = [each.destination for each in addressed.weighted_waypoints]
            every += [addressed.waypoint] if addressed.waypoint else []
            drawn = [w.destination for w in addressed.weighted_waypoints if w.weight > 0]
            if not drawn and addressed.waypoint:
                drawn = [addressed.waypoint]
            if drawn and not any(self.is_waypoint(source, gateway) for gateway in every):
                return {
                    outcome
                    for gateway in drawn
                    for outcome in self.by_waypoint(source, gateway, addressed, target)
                }
        if service is not None:
            balancing = service.load_balancing
            if balancing and balancing.mode is LoadBalancerMode.PASSTHROUGH:
                return {("plain", str(target), None)}
            if target.port not in service.ports:
                return {("refused", "unknown-port")}
            found = self.candidates(source, service, target.port, "app")
            if not found:
                return {("refused", "no-endpoint")}
            return {
                outcome
                for picked, port in found
                for outcome in self.to_workload(source, picked, port, service, addressed, target)
            }
        if workload is None:
            return {("plain", str(target), None)}
        return self.to_workload(source, workload, target.port, None, None, target)

    def to_workload(
        self,
        source: Workload,
        workload: Workload,
        port: int | None,
        service: Service | None,
        addressed: Service | None,
        target: SocketAddress,
    ) -> set[Outcome]:
        if port is None:
            return {("refused", "no-endpoint")}
        if workload.network != source.network:
            return self.across(source, workload, service, addressed, target)
        gateway = None if addressed is not None else workload.waypoint
        if gateway is not None and not self.is_waypoint(source, gateway):
            return self.by_waypoint(source, gateway, service, target)
        ips = self.addresses(workload, target.ip, service)
        if not ips:
            return {("refused", "no-address")}
        if workload.tunnel_protocol is TunnelProtocol.NONE:
            return {("plain", str(SocketAddress(ip, port)), workload.uid) for ip in ips}
        if port in (15001, 15006, 15008):
            return {("refused", "internal-port")}
        return {
            (
                "hbone",
                str(SocketAddress(ip, 15008)),
                str(SocketAddress(ip, port)),
                sans(workload, service),
                None,
                workload.uid,
            )
            for ip in ips
        }

    def by_waypoint(
        self,
        source: Workload,
        gateway: GatewayAddress,
        service: Service | None,
        target: SocketAddress,
    ) -> set[Outcome]:
        out: set[Outcome] = set()
        for workload, port, behind in self.hops(source, gateway, "waypoint"):
            if workload is None or port is None:
                out.add(("refused", "no-waypoint"))
            elif workload.network != source.network:
                out |= self.across(source, workload, behind, service, target)
            else:
                out |= self.tunnels(workload, port, behind, gateway, target, str(target), None)
        return out

    def across(
        self,
        source: Workload,
        far: Workload,
        far_service: Service | None,
        service: Service | None,
        target: SocketAddress,
    ) -> set[Outcome]:
        if far.network_gateway is None or service is None:
            return {("refused", "other-network")}
        inner = frozenset(far_service.subject_alt_names) if far_service else frozenset()
        if not inner:
            return {("refused", "no-identity")}
        out: set[Outcome] = set()
        gateway = far.network_gateway
        for workload, port, behind in self.hops(source, gateway, "gateway"):
            if workload is None or port is None:
                out.add(("refused", "no-gateway"))
            else:
                authority = f"{service.hostname}:{target.port}"
                out |= self.tunnels(workload, port, behind, gateway, target, authority, inner)
        return out

    def tunnels(
        self,
        workload: Workload,
        port: int,
        behind: Service | None,
        gateway: GatewayAddress,
        target: SocketAddress,
        authority: str,
        inner: frozenset[Any] | None,
    ) -> set[Outcome]:
        place = gateway.destination
        wanted = target.ip if isinstance(place, NamespacedHostname) else place.ip
        ips = self.addresses(workload, wanted, behind)
        if not ips:
            return {("refused", "no-address")}
        return {
            (
                "hbone",
                str(SocketAddress(ip, port)),
                authority,
                sans(workload, behind),
                inner,
                workload.uid,
            )
            for ip in ips
        }

    def hops(
        self, source: Workload, gateway: GatewayAddress, purpose: str
    ) -> list[tuple[Workload | None, int | None, Service | None]]:
        found = self.named(gateway, source.namespace)
        if isinstance(found, Workload):
            return [(found, gateway.hbone_mtls_port, None)]
        if found is None:
            return [(None, None, None)]
        balancing = found.load_balancing
        if balancing and balancing.mode is LoadBalancerMode.PASSTHROUGH:
            return [(None, None, None)]
        ends = self.candidates(source, found, gateway.hbone_mtls_port, purpose)
        return [(w, port, found) for w, port in ends] or [(None, None, None)]


def accepts(service: Service, ip: IPAddress) -> bool:
    match service.ip_families:
        case IPFamilies.IPV4_ONLY:
            return ip.version == 4
        case IPFamilies.IPV6_ONLY:
            return ip.version == 6
        case _:
            return True


def sans(workload: Workload, service: Service | None) -> frozenset[Any]:
    more = () if service is None else service.subject_alt_names
    return frozenset((workload.identity, *more))


def rank(
    scopes: Sequence[LoadBalancerScope], source: Workload, workload: Workload
) -> tuple[int, int]:
    """How many scopes match in a row; a NETWORK in front is a wish that outweighs the rest."""
    matched = 0
    for index, scope in enumerate(scopes):
        if scope is LoadBalancerScope.NETWORK and index == 0:
            if source.network != workload.network:
                continue
        elif not same(scope, source, workload):
            break
        matched += 1
    preferred = bool(scopes) and scopes[0] is LoadBalancerScope.NETWORK
    wish = preferred and source.network == workload.network
    return matched, len(scopes) - 1 if wish else 0


def same(scope: LoadBalancerScope, one: Workload, other: Workload) -> bool:
    read = {
        LoadBalancerScope.REGION: lambda w: w.locality.region,
        LoadBalancerScope.ZONE: lambda w: w.locality.zone,
        LoadBalancerScope.SUBZONE: lambda w: w.locality.subzone,
        LoadBalancerScope.NODE: lambda w: w.node,
        LoadBalancerScope.CLUSTER: lambda w: w.cluster_id,
        LoadBalancerScope.NETWORK: lambda w: w.network,
    }[scope]
    return bool(read(one) == read(other))
