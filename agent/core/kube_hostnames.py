"""Which service has a hostname, where Services and ServiceEntries claim the same.

As istiod's `selectWorkloadServices`: in a namespace a Service goes before any
ServiceEntry, and of those the oldest wins; what loses is not in the mesh, with
its endpoints. Of the winners in several namespaces one is canonical, for the
clients of all others: the Service if there is one, else the oldest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from meshbpf.agent.core.kube_cluster import Problems
from meshbpf.agent.core.kube_services import KubeService
from meshbpf.agent.core.workload import NamespacedHostname


def settle(
    services: Iterable[KubeService], problems: Problems
) -> dict[NamespacedHostname, KubeService]:
    """The services of the mesh; losers are told."""
    claims: dict[str, list[KubeService]] = defaultdict(list)
    for each in services:
        claims[each.service.hostname].append(each)
    found: dict[NamespacedHostname, KubeService] = {}
    for claimants in claims.values():
        for each in winners(claimants, problems):
            found[each.key] = each
    return found


def winners(claimants: Iterable[KubeService], problems: Problems) -> Iterable[KubeService]:
    """Of all services with one hostname those that the mesh has; the canonical one first."""
    found: dict[str, KubeService] = {}
    for each in sorted(claimants, key=lambda one: one.age):
        first = found.get(each.service.namespace)
        if first is not None:
            host = list(each.owner.spec["hosts"]).index(each.service.hostname)
            problems.note(
                each.owner,
                f"spec.hosts[{host}]",
                f"{each.service.hostname} is {first.owner.key}'s",
                "this host is left out",
            )
        elif found:
            found[each.service.namespace] = _canonical(each, canonical=False)
        else:
            found[each.service.namespace] = _canonical(each, canonical=True)
    return found.values()


def _canonical(each: KubeService, *, canonical: bool) -> KubeService:
    if each.service.canonical == canonical:
        return each
    return replace(each, service=replace(each.service, canonical=canonical))
