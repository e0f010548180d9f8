"""Which service has a hostname, where Services and ServiceEntries claim the same.

As istiod's `selectWorkloadServices`: in a namespace a Service goes before any
ServiceEntry, and of those the oldest wins; what loses is not in the mesh, with
its endpoints. Of the winners in several namespaces one is canonical, for the
clients of all others: the Service if there is one, else the oldest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from meshbpf.agent.core.kube_cluster import Problems
from meshbpf.agent.core.kube_selectors import SelectorIndex
from meshbpf.agent.core.kube_services import KubeService
from meshbpf.agent.core.objects import ObjectKey
from meshbpf.agent.core.workload import NamespacedHostname

Claim = tuple[ObjectKey, str]
"""Whose it is, and for which hostname."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A service of the mesh that is not what it was."""

    key: NamespacedHostname
    old: KubeService | None
    new: KubeService | None

    @property
    def concerns_workloads(self) -> bool:
        """Whether who is its endpoint, or by which ports, may have changed."""
        old, new = self.old, self.new
        if old is None or new is None or old.owner.key != new.owner.key:
            return True
        return (old.selector, old.ports) != (new.selector, new.ports)


class Hostnames:
    """All claims, and the services that came of them."""

    def __init__(self) -> None:
        self._by_owner: dict[ObjectKey, tuple[KubeService, ...]] = {}
        self._claims: dict[str, dict[ObjectKey, KubeService]] = defaultdict(dict)
        self._had: dict[str, dict[NamespacedHostname, KubeService]] = {}
        self.by_key: dict[NamespacedHostname, KubeService] = {}
        """The services of the mesh."""
        self.selecting: SelectorIndex[NamespacedHostname, KubeService] = SelectorIndex()
        """The same, by what they select."""

    def claim(self, owner: ObjectKey, services: Iterable[KubeService]) -> Iterable[str]:
        """Let `owner` claim what these services are called, and nothing else.

        Gives the names that must be settled.
        """
        before = self._by_owner.pop(owner, ())
        for each in before:
            del self._claims[each.service.hostname][owner]
        now = tuple(services)
        if now:
            self._by_owner[owner] = now
        for each in now:
            self._claims[each.service.hostname][owner] = each
        return (each.service.hostname for each in (*before, *now))

    def settle(self, hostname: str, problems: Problems) -> list[Turn]:
        """Decide who has a hostname. Losers are told."""
        claims = self._claims[hostname]
        now = _winners(claims.values(), problems)
        before = self._had.pop(hostname, {})
        if now:
            self._had[hostname] = now
        else:
            del self._claims[hostname]
        turns: list[Turn] = []
        for key in {**before, **now}:
            turn = Turn(key, before.get(key), now.get(key))
            if turn.old == turn.new and not turn.concerns_workloads:
                continue
            turns.append(turn)
            new = turn.new
            if new is None:
                del self.by_key[key]
                self.selecting.remove(key)
            else:
                self.by_key[key] = new
                self.selecting.put(key, key.namespace, new.selector, new)
        return turns

    def holds(self, service: KubeService) -> bool:
        """Whether this one of several that claim its hostname has it."""
        found = self.by_key.get(service.key)
        return found is not None and found.owner.key == service.owner.key


def _winners(
    claimants: Iterable[KubeService], problems: Problems
) -> dict[NamespacedHostname, KubeService]:
    found: dict[NamespacedHostname, KubeService] = {}
    for each in sorted(claimants, key=lambda one: one.age):
        first = found.get(each.key)
        if first is None:
            found[each.key] = _canonical(each, canonical=not found)
            continue
        host = list(each.owner.spec["hosts"]).index(each.service.hostname)
        problems.note(
            each.owner,
            f"spec.hosts[{host}]",
            f"{each.service.hostname} is {first.owner.key}'s",
            "this host is left out",
        )
    return found


def _canonical(each: KubeService, *, canonical: bool) -> KubeService:
    if each.service.canonical == canonical:
        return each
    return replace(each, service=replace(each.service, canonical=canonical))
