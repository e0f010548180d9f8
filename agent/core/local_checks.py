"""How the records of one LOCAL_XDS file must fit together."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator

from meshbpf.agent.core.fields import Field
from meshbpf.agent.core.policy import Authorization, PolicyScope
from meshbpf.agent.core.service import Service
from meshbpf.agent.core.store import address_rank
from meshbpf.agent.core.workload import (
    GatewayAddress,
    NamespacedHostname,
    NetworkAddress,
    NetworkMode,
    Workload,
)

# (what must be unique, its record, where in the record, how to call it)
_Claim = tuple[Hashable, Field, tuple[str | int, ...], str]


def check_together(
    workloads: list[tuple[Workload, Field]],
    services: list[tuple[Service, Field]],
    policies: list[tuple[Authorization, Field]],
) -> None:
    """Raise a ConfigError for the first record that does not fit the others."""
    uids = _unique((w.uid, field, ("uid",), f"uid {w.uid!r}") for w, field in workloads)
    keys = _unique((s.key, field, ("hostname",), f"service {s}") for s, field in services)
    named = {policy.key: policy for policy, _ in policies}
    _unique((p.key, field, ("name",), f"policy {p.key}") for p, field in policies)
    _unique(_workload_addresses(workloads))
    _unique(_service_addresses(services))
    hostnames = {NamespacedHostname(w.namespace, w.hostname) for w, _ in workloads if w.hostname}
    known_addresses: set[NetworkAddress] = {a for s, _ in services for a in s.addresses}
    known_addresses.update(
        NetworkAddress(w.network, ip)
        for w, _ in workloads
        if w.network_mode is NetworkMode.STANDARD
        for ip in w.addresses
    )
    ranges = [each for s, _ in services for each in s.cidr_addresses]

    def check_gateway(gateway: GatewayAddress | None, field: Field, *path: str | int) -> None:
        if gateway is None:
            return
        place = gateway.destination
        if isinstance(place, NamespacedHostname):
            known = place in keys or place in hostnames
        else:
            known = place in known_addresses or any(
                r.network == place.network and place.ip in r.cidr for r in ranges
            )
        if not known:
            raise field.at(*path).error(f"nothing in this file is {place}")

    for workload, field in workloads:
        for key in workload.services:
            if key not in keys:
                raise field.at("services", str(key)).error(f"no service in this file is {key}")
        for index, name in enumerate(workload.authorization_policies):
            policy = named.get(name)
            here = ("authorizationPolicies", index)
            if policy is None:
                raise field.at(*here).error(f"no policy in this file is {name}")
            if policy.scope is not PolicyScope.WORKLOAD_SELECTOR:
                raise field.at(*here).error(
                    f"policy {name} has another scope than WorkloadSelector"
                )
        check_gateway(workload.waypoint, field, "waypoint", "destination")
        check_gateway(workload.network_gateway, field, "networkGateway", "destination")
    for service, field in services:
        for endpoint in service.endpoints:
            if endpoint.workload_uid not in uids:
                raise field.at("endpoints", endpoint.workload_uid).error(
                    "no workload in this file has this uid"
                )
        check_gateway(service.waypoint, field, "waypoint", "destination")
        for index, each in enumerate(service.weighted_waypoints):
            check_gateway(
                each.destination, field, "weightedWaypoints", index, "destination", "destination"
            )


def _workload_addresses(workloads: Iterable[tuple[Workload, Field]]) -> Iterator[_Claim]:
    for workload, field in workloads:
        for index, ip in enumerate(workload.addresses):
            if workload.network_mode is NetworkMode.HOST_NETWORK:
                continue  # shares its node's address with others
            # A Pod and, say, a WorkloadEntry may claim one address: rank decides.
            key = (workload.network, ip, address_rank(workload))
            yield key, field, ("workloadIps", index), f"address {ip}"


def _service_addresses(services: Iterable[tuple[Service, Field]]) -> Iterator[_Claim]:
    # Across namespaces one virtual address may be several services': the client's decides.
    for service, field in services:
        for index, vip in enumerate(service.addresses):
            yield (service.namespace, vip), field, ("vips", index), f"virtual address {vip}"
        for index, cidr in enumerate(service.cidr_addresses):
            yield (service.namespace, cidr), field, ("cidrVips", index), f"range {cidr}"


def _unique(claims: Iterable[_Claim]) -> frozenset[Hashable]:
    """All keys; two records with one key are an error, told at the second."""
    seen: dict[Hashable, int] = {}
    for key, field, path, what in claims:
        if key in seen:
            raise field.at(*path).error(f"{what} is in the record at line {seen[key]} already")
        seen[key] = field.node.line
    return frozenset(seen)
