"""ServiceEntries as the mesh's services, one for each host, with their own endpoints.

As istiod's `constructServiceEntries` (pilot/pkg/serviceregistry/ambient/services.go).
What the API server's webhook would not have let pass, and a node proxy could
not carry, is refused (Istio's ValidateServiceEntry). `location` changes
nothing: whether an endpoint takes HBONE is said by labels. Nor does
`exportTo`, which Istio's ambient mode does not read; that is told.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from meshbpf.agent.core.identity import IdentityError, SpiffeId
from meshbpf.agent.core.kube_cluster import Problems
from meshbpf.agent.core.kube_entries import Entry, is_fqdn, read_entry
from meshbpf.agent.core.kube_names import AUTO_ALLOCATE
from meshbpf.agent.core.kube_services import KubeService, ServicePort, preferred_scopes
from meshbpf.agent.core.kube_waypoints import Waypoints
from meshbpf.agent.core.object_fields import Value
from meshbpf.agent.core.objects import KubeObject
from meshbpf.agent.core.service import (
    HealthPolicy,
    LoadBalancerMode,
    LoadBalancing,
    NetworkCidr,
    Service,
)
from meshbpf.agent.core.workload import NetworkAddress

_SPEC = (
    "hosts",
    "addresses",
    "ports",
    "location",
    "resolution",
    "endpoints",
    "workloadSelector",
    "exportTo",
    "subjectAltNames",
)
NONE, STATIC, DNS, ROUND_ROBIN, DYNAMIC = "NONE", "STATIC", "DNS", "DNS_ROUND_ROBIN", "DYNAMIC_DNS"
_RESOLUTIONS = {each: each for each in (NONE, STATIC, DNS, ROUND_ROBIN, DYNAMIC)}
_BY_NAME = (DNS, ROUND_ROBIN, DYNAMIC)
_LOCATIONS = {each: each for each in ("MESH_EXTERNAL", "MESH_INTERNAL")}
_PASSTHROUGH = LoadBalancing((), LoadBalancerMode.PASSTHROUGH, HealthPolicy.ALLOW_ALL)


@dataclass(frozen=True, slots=True)
class ServiceEntry:
    """One that was understood."""

    owner: KubeObject
    services: tuple[KubeService, ...]
    """One for each host, in their order."""
    endpoints: tuple[Entry, ...]
    by_name: bool
    """Its hosts are its endpoints: the resolver says where they are."""


def read_service_entry(
    owner: KubeObject,
    namespace: KubeObject | None,
    network: str,
    waypoints: Waypoints,
    problems: Problems,
) -> ServiceEntry:
    """One ServiceEntry. Raises ObjectError; `network` is the cluster's."""
    fields = Value.spec(owner).record(_SPEC)
    resolution = fields["resolution"].choice(_RESOLUTIONS) if "resolution" in fields else NONE
    if "location" in fields:
        fields["location"].choice(_LOCATIONS)
    ports = _ports(fields)
    endpoints = _endpoints(fields, resolution, ports)
    selector = _selector(fields)
    by_name = not endpoints and "workloadSelector" not in fields and resolution in _BY_NAME
    hosts = _hosts(owner, fields, resolution, by_name=by_name)
    addresses, ranges = _addresses(fields, network, resolution)
    given = {}
    if not addresses and not ranges and resolution != NONE:
        given = _allocated(owner, network, resolution)
    identities = _identities(fields)
    _tell_of_exports(owner, fields, problems)
    binding = waypoints.of_service(owner, problems)
    template = Service(
        name=owner.name,
        namespace=owner.namespace,
        hostname="",
        addresses=addresses,
        cidr_addresses=ranges,
        ports={port.port: port.target for port in ports.values() if port is not None},
        subject_alt_names=identities,
        waypoint=binding.address,
        weighted_waypoints=binding.weighted,
        load_balancing=_balancing(owner, namespace, resolution),
    )
    carried = tuple(port for port in ports.values() if port is not None)
    services = (
        replace(template, hostname=host, addresses=given.get(host, addresses)) for host in hosts
    )
    return ServiceEntry(
        owner,
        tuple(KubeService(each, selector, carried, owner) for each in services),
        endpoints,
        by_name,
    )


def _ports(fields: Mapping[str, Value]) -> dict[str, ServicePort | None]:
    """By name; None for those that nothing of the mesh carries."""
    found: dict[str, ServicePort | None] = {}
    numbers: set[int] = set()
    for item in fields["ports"].items() if "ports" in fields else ():
        port = item.record(("number", "name", "protocol", "targetPort"))
        number = item.need(port, "number").integer(1, 65535)
        name = item.need(port, "name").text()
        target = port["targetPort"].integer(0, 65535) if "targetPort" in port else 0
        protocol = port["protocol"].text(empty=True) if "protocol" in port else ""
        if name in found:
            raise port["name"].error(f"{name!r} is another port's name")
        if number in numbers:
            raise port["number"].error(f"{number} is listed twice")
        numbers.add(number)
        carried = ServicePort(name, number, target or number, "")
        found[name] = None if protocol.upper() == "UDP" else carried
    return found


def _endpoints(
    fields: Mapping[str, Value], resolution: str, ports: Collection[str]
) -> tuple[Entry, ...]:
    listed = fields.get("endpoints")
    if listed is None:
        return ()
    found: list[Entry] = []
    for item in listed.items():
        entry = read_entry(item)
        if resolution == STATIC and entry.address and entry.ip is None:
            what = f"{entry.address!r} is no IP address, and the resolution is STATIC"
            raise item.get("address").error(what)
        for name in entry.ports:
            if name not in ports:
                raise item.get("ports").error(f"no port of the entry is called {name!r}")
        found.append(entry)
    if found and resolution in (NONE, DYNAMIC):
        raise listed.error(f"the resolution {resolution} takes no endpoints")
    if found and "workloadSelector" in fields:
        raise listed.error("cannot stand beside workloadSelector")
    if len(found) > 1 and resolution == ROUND_ROBIN:
        raise listed.error(f"the resolution {resolution} takes one endpoint at most")
    return tuple(found)


def _selector(fields: Mapping[str, Value]) -> Mapping[str, str]:
    if "workloadSelector" not in fields:
        return {}
    labels = fields["workloadSelector"].record(("labels",)).get("labels")
    return {} if labels is None else labels.labels()


def _hosts(
    owner: KubeObject, fields: Mapping[str, Value], resolution: str, *, by_name: bool
) -> tuple[str, ...]:
    listed = Value.spec(owner).need(fields, "hosts")
    found: dict[str, None] = {}
    for item in listed.items():
        host = item.text()
        wild = host.startswith("*")
        if host == "*" or not is_fqdn(host.removeprefix("*.").removeprefix("*")):
            raise item.error(f"{host!r} is neither a host's name nor *. before one")
        if host in found:
            raise item.error(f"{host!r} is listed twice")
        if wild and by_name and resolution != DYNAMIC:
            raise item.error(f"{host!r} cannot be looked up, and the entry has no endpoints")
        if not wild and resolution == DYNAMIC:
            raise item.error(f"{host!r}: the resolution {DYNAMIC} is for wildcards")
        found[host] = None
    if not found:
        raise listed.error("must not be empty")
    return tuple(found)


def _addresses(
    fields: Mapping[str, Value], network: str, resolution: str
) -> tuple[tuple[NetworkAddress, ...], tuple[NetworkCidr, ...]]:
    addresses: list[NetworkAddress] = []
    ranges: list[NetworkCidr] = []
    for item in fields["addresses"].items() if "addresses" in fields else ():
        if "/" not in item.text():
            addresses.append(NetworkAddress(network, item.ip()))
            continue
        cidr = item.cidr()
        if resolution not in (NONE, STATIC):
            raise item.error(f"the resolution {resolution} takes no ranges of addresses")
        if cidr.prefixlen == cidr.max_prefixlen:
            addresses.append(NetworkAddress(network, cidr.network_address))
        else:
            ranges.append(NetworkCidr(network, cidr))
    return tuple(addresses), tuple(ranges)


def _allocated(
    owner: KubeObject, network: str, resolution: str
) -> dict[str, tuple[NetworkAddress, ...]]:
    """What istiod's allocator wrote into the status, by host."""
    if owner.labels.get(AUTO_ALLOCATE, "").lower() == "false":
        return {}
    found: dict[str, tuple[NetworkAddress, ...]] = {}
    listed = Value.of(owner, "status").get("addresses")
    for item in listed.items() if listed.present else ():
        host = item.get("host")
        name = host.text(empty=True) if host.present else ""
        if name.startswith("*") and resolution != DYNAMIC:
            continue
        address = NetworkAddress(network, item.get("value").ip())
        found[name] = (*found.get(name, ()), address)
    return found


def _balancing(
    owner: KubeObject, namespace: KubeObject | None, resolution: str
) -> LoadBalancing | None:
    if resolution == NONE:
        return _PASSTHROUGH
    scopes = preferred_scopes(owner, namespace)
    return LoadBalancing(scopes, LoadBalancerMode.FAILOVER) if scopes else None


def _identities(fields: Mapping[str, Value]) -> tuple[SpiffeId, ...]:
    found: list[SpiffeId] = []
    for text in fields["subjectAltNames"].texts() if "subjectAltNames" in fields else ():
        try:
            found.append(SpiffeId.parse(text))
        except IdentityError:
            continue  # a name of another kind widens nothing: no peer proves it to us
    return tuple(found)


def _tell_of_exports(owner: KubeObject, fields: Mapping[str, Value], problems: Problems) -> None:
    exported = fields["exportTo"].texts() if "exportTo" in fields else ()
    if exported and "*" not in exported:
        what = "Istio's ambient mode does not read it"
        problems.note(owner, "spec.exportTo", what, "all namespaces see the service")
