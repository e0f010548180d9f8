"""PeerAuthentication as DENY policies: what istiod makes of it for node proxies.

STRICT means that a connection whose caller proved no identity is denied. One
fixed policy says that, and workloads under STRICT name it; a workload policy
whose ports differ from its mode becomes a policy of its own, merged with what
stands above it, since of several DENY policies each denies by itself. DISABLE
and PERMISSIVE are the same here: a node proxy takes HBONE and plaintext alike.

Follows istiod's `convertedSelectorPeerAuthentications` and
`convertPeerAuthentication` (pilot/pkg/serviceregistry/ambient/authorization.go).
A PeerAuthentication that cannot be read counts as STRICT.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from meshbpf.agent.core.kube_cluster import Cluster, Problems, by_age
from meshbpf.agent.core.kube_selectors import has_all
from meshbpf.agent.core.object_fields import ObjectError, Value
from meshbpf.agent.core.objects import KubeObject
from meshbpf.agent.core.policy import (
    Authorization,
    Clause,
    Match,
    MatchKind,
    PolicyAction,
    PolicyScope,
    Rule,
    StringMatch,
)

STATIC_STRICT = "istio_converted_static_strict"
CONVERTED = "converted_peer_authentication_"
"""Names that no Kubernetes object can have, for their underscores."""

UNSET, STRICT, PERMISSIVE = "UNSET", "STRICT", "PERMISSIVE"
_MODES = {UNSET: UNSET, STRICT: STRICT, PERMISSIVE: PERMISSIVE, "DISABLE": PERMISSIVE}
_NOBODY = Match(not_principals=(StringMatch(MatchKind.PRESENCE),))
_WITHOUT_IDENTITY: Clause = (_NOBODY,)


@dataclass(frozen=True, slots=True)
class PeerAuthentication:
    """One, as written; `selector` is None for a whole namespace's, or the mesh's."""

    namespace: str
    name: str
    selector: Mapping[str, str] | None
    mode: str
    ports: Mapping[int, str] = field(default_factory=dict, hash=False)

    @property
    def converted_name(self) -> str:
        """Of the policy that its ports become."""
        return CONVERTED + self.name


class PeerAuthentications:
    """All of a cluster's, oldest first: of two that conflict the older one wins."""

    def __init__(self, objects: Iterable[KubeObject], cluster: Cluster, problems: Problems) -> None:
        self._root = cluster.root_namespace
        self._all: list[PeerAuthentication] = []
        self._within: dict[str, list[PeerAuthentication]] = defaultdict(list)
        for each in by_age(objects):
            try:
                one = _read(each)
            except ObjectError as error:
                problems.reject(error, each.origin, "it counts as STRICT")
                one = PeerAuthentication(each.namespace, each.name, None, STRICT)
            self._all.append(one)
            self._within[each.namespace].append(one)

    @property
    def policies(self) -> list[Authorization]:
        """The fixed STRICT policy, and those that workload policies with ports become."""
        if not self._all:
            return []
        found = [self._policy(self._root, STATIC_STRICT, ((_WITHOUT_IDENTITY,),))]
        for each in self._all:
            rules = self._rules(each)
            if rules:
                found.append(self._policy(each.namespace, each.converted_name, rules))
        return found

    def applied(self, namespace: str, labels: Mapping[str, str]) -> tuple[str, ...]:
        """The policies (NAMESPACE/NAME) that a workload names for its mode."""
        above = self._above(namespace)
        own = None
        if namespace != self._root:
            own = next(
                (
                    each
                    for each in self._within.get(namespace, ())
                    if each.selector and has_all(each.selector, labels)
                ),
                None,
            )
        mode = own.mode if own is not None and own.mode != UNSET else above
        named: list[str] = []
        if own is not None and self._rules(own):
            ports = own.ports.values()
            differs = PERMISSIVE if mode == STRICT else STRICT
            if differs in ports:
                named.append(f"{own.namespace}/{own.converted_name}")
                # What is merged into it must not be said a second time.
                mode = PERMISSIVE
        if mode == STRICT:
            named.append(f"{self._root}/{STATIC_STRICT}")
        return tuple(sorted(named))

    def _above(self, namespace: str) -> str:
        """The mode that a namespace has by its own policy or the mesh's."""
        mode = self._whole(self._root)
        own = self._whole(namespace) if namespace != self._root else UNSET
        return own if own != UNSET else mode

    def _whole(self, namespace: str) -> str:
        return next((e.mode for e in self._within.get(namespace, ()) if not e.selector), UNSET)

    def _rules(self, each: PeerAuthentication) -> tuple[Rule, ...]:
        """What a workload policy with ports denies; nothing where the fixed policy says it all."""
        if each.namespace == self._root or not each.selector or not each.ports:
            return ()
        mode = each.mode if each.mode != UNSET else self._above(each.namespace)
        if mode == STRICT:
            open_ports = tuple(sorted(p for p, m in each.ports.items() if m == PERMISSIVE))
            if not open_ports:
                return ()
            clauses: list[Clause] = [_WITHOUT_IDENTITY]
            clauses += [(Match(not_destination_ports=(port,)),) for port in open_ports]
            return (tuple(clauses),)
        strict = sorted(port for port, port_mode in each.ports.items() if port_mode == STRICT)
        return tuple(
            ((Match(not_principals=_NOBODY.not_principals, destination_ports=(port,)),),)
            for port in strict
        )

    def _policy(self, namespace: str, name: str, rules: Sequence[Rule]) -> Authorization:
        return Authorization(
            name=name,
            namespace=namespace,
            scope=PolicyScope.WORKLOAD_SELECTOR,
            action=PolicyAction.DENY,
            rules=tuple(rules),
        )


def _read(owner: KubeObject) -> PeerAuthentication:
    fields = Value.spec(owner).record(("selector", "mtls", "portLevelMtls"))
    selector = None
    if "selector" in fields:
        labels = fields["selector"].record(("matchLabels",)).get("matchLabels")
        selector = None if labels is None else labels.labels() or None
    ports: dict[int, str] = {}
    if "portLevelMtls" in fields:
        for key, value in fields["portLevelMtls"].entries():
            if not key.isdigit() or not 1 <= int(key[:6]) <= 65535:
                raise value.error(f"{key!r} is not a port")
            ports[int(key)] = _mode(value)
    mode = _mode(fields["mtls"]) if "mtls" in fields else UNSET
    return PeerAuthentication(owner.namespace, owner.name, selector, mode, ports)


def _mode(value: Value) -> str:
    fields = value.record(("mode",))
    return fields["mode"].choice(_MODES) if "mode" in fields else UNSET
