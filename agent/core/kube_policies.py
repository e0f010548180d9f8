"""AuthorizationPolicy as the node proxies' Authorization, as istiod converts it.

A policy with targetRefs is a waypoint's and not read here. HTTP attributes
mean nothing to a node proxy, so a rule that has some cannot be evaluated as
it is written, and fails closed, as Istio documents it: in an ALLOW policy the
rule allows nothing; in a DENY policy it denies by what is left of it, which is
more than was asked. (istiod of today leaves out a DENY rule of which nothing
is left; docs/compat.md.) A policy that cannot be read at all fails closed too:
DENY denies everything that it selects, ALLOW allows nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import TypeVar

from meshbpf.agent.core.kube_cluster import Cluster, Problems
from meshbpf.agent.core.kube_names import DRY_RUN
from meshbpf.agent.core.object_fields import ObjectError, Value
from meshbpf.agent.core.objects import KubeObject
from meshbpf.agent.core.policy import (
    Authorization,
    Clause,
    Match,
    PolicyAction,
    PolicyScope,
    Rule,
    ServiceAccountMatch,
    StringMatch,
)

T = TypeVar("T")

_SPEC = ("selector", "targetRef", "targetRefs", "action", "rules", "provider")
_HTTP_OPERATION = ("hosts", "notHosts", "methods", "notMethods", "paths", "notPaths")
_HTTP_SOURCE = ("remoteIpBlocks", "notRemoteIpBlocks", "requestPrincipals", "notRequestPrincipals")
_OPERATION = ("ports", "notPorts", *_HTTP_OPERATION)
_SOURCE = (
    "principals",
    "notPrincipals",
    "namespaces",
    "notNamespaces",
    "serviceAccounts",
    "notServiceAccounts",
    "ipBlocks",
    "notIpBlocks",
    *_HTTP_SOURCE,
)
_EMPTY = Match()
_TRUTHS = ("1", "t", "T", "true", "TRUE", "True")  # what Go's ParseBool takes for true


@dataclass(frozen=True, slots=True)
class KubePolicy:
    """A policy, and which pods of its namespace it selects; None is all of them."""

    policy: Authorization
    selector: Mapping[str, str] | None = None

    @property
    def selects(self) -> Mapping[str, str]:
        """The labels of workloads that must name it; empty for one that holds without that."""
        if self.policy.scope is not PolicyScope.WORKLOAD_SELECTOR:
            return {}
        return self.selector or {}


def read_policy(owner: KubeObject, cluster: Cluster, problems: Problems) -> KubePolicy | None:
    """An AuthorizationPolicy as node proxies evaluate it; None for one that is not theirs."""
    try:
        return _policy(owner, cluster, problems)
    except ObjectError as error:
        closed = _closed(owner, cluster, f"{error.field}: {error.reason}")
        what = "it allows nothing"
        if closed.policy.action is PolicyAction.DENY:
            what = "it denies every connection that it selects"
        problems.reject(error, owner.origin, what)
        return closed


def _policy(owner: KubeObject, cluster: Cluster, problems: Problems) -> KubePolicy | None:
    fields = Value.spec(owner).record(_SPEC)
    if "targetRef" in fields or "targetRefs" in fields:
        return None
    action_field = fields.get("action")
    action = "ALLOW" if action_field is None else action_field.text()
    if action in ("AUDIT", "CUSTOM"):
        what = f"a node proxy cannot take the action {action}"
        problems.note(owner, "spec.action", what, "it is a waypoint's to take, with targetRefs")
        return None
    if action_field is not None:
        action_field.choice({each.value: each for each in PolicyAction})
    selector = _selector(fields.get("selector"))
    reader = _Reader(owner, PolicyAction(action))
    rules = fields.get("rules")
    policy = Authorization(
        name=owner.name,
        namespace=owner.namespace,
        scope=_scope(owner, cluster, selector),
        action=PolicyAction(action),
        rules=() if rules is None else reader.rules(rules),
        dry_run=owner.annotations.get(DRY_RUN) in _TRUTHS,
    )
    if reader.http:
        allow = action == "ALLOW"
        rules_do = "allow nothing" if allow else "deny by what is left of them"
        problems.note(
            owner,
            "spec.rules",
            f"a node proxy does not see HTTP's {', '.join(sorted(reader.http))}",
            f"the rules with them {rules_do}; enforce them in a waypoint, by targetRefs",
        )
    return KubePolicy(policy, selector)


def _closed(owner: KubeObject, cluster: Cluster, why: str) -> KubePolicy:
    """What stands for a policy that cannot be read; it selects no less than was meant."""
    try:
        fields = Value.spec(owner).get("selector")
        selector = _selector(fields if fields.present else None)
    except ObjectError:
        selector = None
    allow = owner.spec.get("action", "ALLOW") == "ALLOW"
    policy = Authorization(
        name=owner.name,
        namespace=owner.namespace,
        scope=_scope(owner, cluster, selector),
        action=PolicyAction.ALLOW if allow else PolicyAction.DENY,
        inexpressible=why,
    )
    return KubePolicy(policy, selector)


def _selector(field: Value | None) -> Mapping[str, str] | None:
    """An empty selector selects all, as everywhere in Istio but in istiod's conversion."""
    if field is None:
        return None
    labels = field.record(("matchLabels",)).get("matchLabels")
    return None if labels is None else labels.labels() or None


def _scope(owner: KubeObject, cluster: Cluster, selector: object) -> PolicyScope:
    if selector is not None:
        return PolicyScope.WORKLOAD_SELECTOR
    at_root = owner.namespace == cluster.root_namespace
    return PolicyScope.GLOBAL if at_root else PolicyScope.NAMESPACE


class _Reader:
    """Reads the rules of one policy, and notes the HTTP attributes that it meets."""

    def __init__(self, owner: KubeObject, action: PolicyAction) -> None:
        self._namespace = owner.namespace
        self._allow = action is PolicyAction.ALLOW
        self.http: set[str] = set()
        self._rule_has_http = False

    def rules(self, field: Value) -> tuple[Rule, ...]:
        found: list[Rule] = []
        for item in field.items():
            self._rule_has_http = False
            rule = self._rule(item)
            if not (self._rule_has_http and self._allow):
                found.append(rule)
        return tuple(found)

    def _rule(self, field: Value) -> Rule:
        if field.raw is None:
            return ()
        fields = field.record(("from", "to", "when"))
        clauses: list[Clause | None] = []
        if "to" in fields:
            clauses.append(self._clause(self._operation(item) for item in fields["to"].items()))
        if "from" in fields:
            clauses.append(self._clause(self._source(item) for item in fields["from"].items()))
        if "when" in fields:
            clauses.extend(self._clause((self._when(item),)) for item in fields["when"].items())
        return tuple(clause for clause in clauses if clause is not None)

    def _clause(self, matches: Iterable[Match]) -> Clause | None:
        """None where a DENY rule must do without the clause: a part of it cannot be told."""
        found = tuple(matches)
        if not self._allow and _EMPTY in found:
            return None
        return found or None

    def _operation(self, item: Value) -> Match:
        operation = item.record(("operation",)).get("operation")
        fields = {} if operation is None else operation.record(_OPERATION)
        self._saw(fields, _HTTP_OPERATION)
        return Match(
            destination_ports=_listed(fields, "ports", _port),
            not_destination_ports=_listed(fields, "notPorts", _port),
        )

    def _source(self, item: Value) -> Match:
        source = item.record(("source",)).get("source")
        fields = {} if source is None else source.record(_SOURCE)
        self._saw(fields, _HTTP_SOURCE)
        return Match(
            principals=_listed(fields, "principals", _string),
            not_principals=_listed(fields, "notPrincipals", _string),
            namespaces=_listed(fields, "namespaces", _string),
            not_namespaces=_listed(fields, "notNamespaces", _string),
            service_accounts=_listed(fields, "serviceAccounts", self._account),
            not_service_accounts=_listed(fields, "notServiceAccounts", self._account),
            source_ips=_listed(fields, "ipBlocks", _cidr),
            not_source_ips=_listed(fields, "notIpBlocks", _cidr),
        )

    def _when(self, item: Value) -> Match:
        fields = item.record(("key", "values", "notValues"))
        match item.need(fields, "key").text():
            case "source.ip":
                return Match(
                    source_ips=_listed(fields, "values", _cidr),
                    not_source_ips=_listed(fields, "notValues", _cidr),
                )
            case "source.namespace":
                return Match(
                    namespaces=_listed(fields, "values", _string),
                    not_namespaces=_listed(fields, "notValues", _string),
                )
            case "source.principal":
                return Match(
                    principals=_listed(fields, "values", _string),
                    not_principals=_listed(fields, "notValues", _string),
                )
            case "source.serviceAccount":
                return Match(
                    service_accounts=_listed(fields, "values", self._account),
                    not_service_accounts=_listed(fields, "notValues", self._account),
                )
            case "destination.ip":
                return Match(
                    destination_ips=_listed(fields, "values", _cidr),
                    not_destination_ips=_listed(fields, "notValues", _cidr),
                )
            case "destination.port":
                return Match(
                    destination_ports=_listed(fields, "values", _port),
                    not_destination_ports=_listed(fields, "notValues", _port),
                )
            case other:
                self.http.add(other)
                self._rule_has_http = True
                return _EMPTY

    def _saw(self, fields: Mapping[str, Value], http: Iterable[str]) -> None:
        seen = {key for key in http if key in fields}
        self.http |= seen
        self._rule_has_http = self._rule_has_http or bool(seen)

    def _account(self, item: Value) -> ServiceAccountMatch:
        """`account`, of the policy's own namespace, or `namespace/account`."""
        namespace, slash, account = item.text().partition("/")
        if not slash:
            namespace, account = self._namespace, namespace
        if not namespace or not account or "/" in account:
            raise item.error(f"{item.raw!r} is neither ACCOUNT nor NAMESPACE/ACCOUNT")
        return ServiceAccountMatch(namespace, account)


def _listed(fields: Mapping[str, Value], key: str, reader: Callable[[Value], T]) -> tuple[T, ...]:
    found = fields.get(key)
    return () if found is None else tuple(reader(item) for item in found.items())


def _string(item: Value) -> StringMatch:
    return StringMatch.read(item.text())


def _port(item: Value) -> int:
    """Ports are texts in this API."""
    text = item.text() if isinstance(item.raw, str) else str(item.integer(1, 65535))
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:6]) <= 65535:
        raise item.error(f"{text!r} is not a port")
    return int(text)


def _cidr(item: Value) -> IPv4Network | IPv6Network:
    return item.cidr()
