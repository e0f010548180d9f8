"""Which host names the mesh answers for, and with which addresses.

Pure: takes a snapshot, the asking workload and a name, and returns what a DNS
answer says, or None when the pod's own resolver must be asked. Follows Istio's
ztunnel (src/dns/server.rs) in what a name may stand for and in which order:

1. the name itself;
2. its Kubernetes expansions: `svc`, `svc.ns`, `svc.ns.svc` and the same with a
   pod's name in front, completed to `....svc.DOMAIN`;
3. the name without one of the search domains that Kubernetes gives to a pod
   (`ns.svc.DOMAIN`, `svc.DOMAIN`, `DOMAIN`), and the expansions of that;

each with the wildcards that cover it, longest first. Two differences: the pods
of a headless service have names here (`pod.svc.ns.svc.DOMAIN`, as a StatefulSet's
have), and SRV questions are answered for services that only the mesh knows.

Names are lower-case text without a final dot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from meshbpf.agent.core.address import IPAddress
from meshbpf.agent.core.service import Service
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import Workload

TTL_S = 30
"""ztunnel's DEFAULT_TTL_SECONDS."""


class RecordType(IntEnum):
    """Of RFC 1035, 3596 and 2782, as far as the mesh answers for it."""

    A = 1
    CNAME = 5
    AAAA = 28
    SRV = 33


_VERSIONS = {RecordType.A: 4, RecordType.AAAA: 6}


@dataclass(frozen=True, slots=True)
class Host:
    """A name that the mesh knows. No addresses: the name exists, without such records."""

    addresses: tuple[IPAddress, ...]
    """In the state's order; whoever answers shuffles them."""
    canonical: str | None = None
    """What the asked name is an alias of, where a search domain was taken off."""


@dataclass(frozen=True, slots=True)
class _Alias:
    name: str
    stripped: str | None = None


def host(
    mesh: Snapshot,
    client: Workload,
    name: str,
    kind: RecordType,
    *,
    domain: str = "cluster.local",
    preferred_namespace: str = "",
) -> Host | None:
    """What `client` is told of `name`; None when the mesh does not know it.

    `domain` is the cluster's. `preferred_namespace` wins among services of one
    hostname in other namespaces than the client's (ztunnel's
    PREFERED_SERVICE_NAMESPACE). `kind` is A or AAAA.
    """
    version = _VERSIONS[kind]
    for alias in _aliases(client.namespace, name, domain):
        for candidate in _with_wildcards(alias.name):
            service = _service(mesh, client, candidate, domain, preferred_namespace)
            if service is not None:
                canonical = None if candidate.startswith("*") else alias.stripped
                return Host(_addresses(mesh, client, service, version), canonical)
        pod = _pod_of_headless(mesh, client, alias.name, domain)
        if pod is not None:
            found = tuple(ip for ip in pod.addresses if ip.version == version)
            return Host(found, alias.stripped)
    return None


def service_port(
    mesh: Snapshot, client: Workload, name: str, *, domain: str = "cluster.local"
) -> tuple[str, int] | None:
    """Target and port for an SRV question, `_name._tcp.HOST`; None: ask the pod's resolver.

    The workload API carries no port names, and a cluster's DNS server knows
    those of its own services. So only a service outside the cluster's domain
    that has a single port is answered for: every name can only mean that one.
    """
    labels = name.split(".", 2)
    if len(labels) < 3 or labels[1] != "_tcp" or not labels[0].startswith("_"):
        return None
    service = _service(mesh, client, labels[2], domain, "")
    if service is None or _is_below(service.hostname, f"svc.{domain}") or len(service.ports) != 1:
        return None
    return service.hostname, next(iter(service.ports))


def _aliases(namespace: str, name: str, domain: str) -> Iterator[_Alias]:
    seen = {name}
    yield _Alias(name)
    for expanded in _expansions(namespace, name, domain):
        if expanded not in seen:
            seen.add(expanded)
            yield _Alias(expanded)
    for search in (f"{namespace}.svc.{domain}", f"svc.{domain}", domain):
        if not _is_below(name, search):
            continue
        stripped = name[: -len(search) - 1]
        for found in (stripped, *_expansions(namespace, stripped, domain)):
            if found not in seen:
                seen.add(found)
                yield _Alias(found, stripped)


def _expansions(namespace: str, name: str, domain: str) -> Iterator[str]:
    """The full names that a short one may be short for; longer ones are full already."""
    labels = name.split(".")
    match len(labels):
        case 1:
            yield f"{name}.{namespace}.svc.{domain}"
        case 2:
            yield f"{name}.svc.{domain}"
            yield f"{name}.{namespace}.svc.{domain}"
        case 3:
            if labels[-1] == "svc":
                yield f"{name}.{domain}"
            yield f"{name}.svc.{domain}"
        case 4 if labels[-1] == "svc":
            yield f"{name}.{domain}"
        case _:
            return


def _with_wildcards(name: str) -> Iterator[str]:
    """`www.example.com`, `*.example.com`, `*.com`."""
    yield name
    rest = name
    while "." in rest:
        rest = rest.split(".", 1)[1]
        yield f"*.{rest}"


def _service(
    mesh: Snapshot, client: Workload, name: str, domain: str, preferred_namespace: str
) -> Service | None:
    best = mesh.service_with_hostname(name, client.namespace)
    if best is not None and preferred_namespace and best.namespace != client.namespace:
        preferred = mesh.service(preferred_namespace, name)
        if preferred is not None and preferred.visible_to(client.namespace):
            best = preferred
    # Without an address it is either headless, which only Kubernetes' own are,
    # or one whose addresses some other resolver knows.
    if best is None or best.addresses or _is_below(best.hostname, f"svc.{domain}"):
        return best
    return None


def _addresses(
    mesh: Snapshot, client: Workload, service: Service, version: int
) -> tuple[IPAddress, ...]:
    if service.addresses:
        return tuple(
            vip.ip
            for vip in service.addresses
            if vip.network == client.network
            and vip.ip.version == version
            and service.accepts(vip.ip)
        )
    # Headless: one address for each endpoint. A pod may have addresses of a
    # family that its service has not.
    found = []
    for endpoint in mesh.endpoints(service):
        usable = (ip for ip in endpoint.workload.addresses if ip.version == version)
        ip = next(usable, None)
        if ip is not None and service.accepts(ip):
            found.append(ip)
    return tuple(found)


def _pod_of_headless(mesh: Snapshot, client: Workload, name: str, domain: str) -> Workload | None:
    pod, _, hostname = name.partition(".")
    if not _is_below(hostname, f"svc.{domain}"):
        return None
    service = mesh.service_with_hostname(hostname, client.namespace)
    if service is None or service.addresses or not service.visible_to(client.namespace):
        return None
    for endpoint in mesh.endpoints(service):
        if endpoint.workload.name == pod and endpoint.workload.namespace == service.namespace:
            return endpoint.workload
    return None


def _is_below(name: str, domain: str) -> bool:
    return name.endswith(f".{domain}")
