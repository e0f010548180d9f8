"""The policies of a LOCAL_XDS file, key by key.

The keys are those of ztunnel's `Authorization` and `RbacMatch` (its
src/rbac.rs). ztunnel skips a match key that it does not know, which opens
what the policy meant to close; here it is refused like any other.
"""

from __future__ import annotations

from meshbpf.agent.core.fields import Field
from meshbpf.agent.core.identity import SCHEME
from meshbpf.agent.core.policy import (
    Authorization,
    Match,
    MatchKind,
    PolicyAction,
    PolicyScope,
    Rule,
    ServiceAccountMatch,
    StringMatch,
)
from meshbpf.agent.core.yaml_tree import Scalar, Sequence

_SCOPES = {
    "Global": PolicyScope.GLOBAL,
    "Namespace": PolicyScope.NAMESPACE,
    "WorkloadSelector": PolicyScope.WORKLOAD_SELECTOR,
}
_ACTIONS = {"Allow": PolicyAction.ALLOW, "Deny": PolicyAction.DENY}
_KINDS = {
    "Exact": MatchKind.EXACT,
    "Prefix": MatchKind.PREFIX,
    "Suffix": MatchKind.SUFFIX,
    "Presence": MatchKind.PRESENCE,
}
_POLICY_KEYS = ("name", "namespace", "scope", "action", "rules", "dryRun")
_MATCH_KEYS = (
    "namespaces",
    "notNamespaces",
    "serviceAccounts",
    "notServiceAccounts",
    "principals",
    "notPrincipals",
    "sourceIps",
    "notSourceIps",
    "destinationIps",
    "notDestinationIps",
    "destinationPorts",
    "notDestinationPorts",
)


def read_policy(field: Field) -> Authorization:
    """One item of `policies`."""
    fields = field.record(_POLICY_KEYS)
    scope = field.need(fields, "scope").choice(_SCOPES)
    namespace = field.need(fields, "namespace")
    dry_run = fields.get("dryRun")
    return Authorization(
        name=field.need(fields, "name").text(),
        namespace=namespace.text(empty=scope is PolicyScope.GLOBAL),
        scope=scope,
        action=field.need(fields, "action").choice(_ACTIONS),
        rules=tuple(_rule(item) for item in field.need(fields, "rules").items()),
        dry_run=dry_run is not None and dry_run.boolean(),
    )


def _rule(field: Field) -> Rule:
    return tuple(tuple(_match(each) for each in clause.items()) for clause in field.items())


def _match(field: Field) -> Match:
    fields = field.record(_MATCH_KEYS)

    def items(key: str) -> list[Field]:
        return list(fields[key].items()) if key in fields else []

    return Match(
        namespaces=tuple(_string_match(item) for item in items("namespaces")),
        not_namespaces=tuple(_string_match(item) for item in items("notNamespaces")),
        service_accounts=tuple(_account(item) for item in items("serviceAccounts")),
        not_service_accounts=tuple(_account(item) for item in items("notServiceAccounts")),
        principals=tuple(_principal(item) for item in items("principals")),
        not_principals=tuple(_principal(item) for item in items("notPrincipals")),
        source_ips=tuple(item.checked_cidr(item.text()) for item in items("sourceIps")),
        not_source_ips=tuple(item.checked_cidr(item.text()) for item in items("notSourceIps")),
        destination_ips=tuple(item.checked_cidr(item.text()) for item in items("destinationIps")),
        not_destination_ips=tuple(
            item.checked_cidr(item.text()) for item in items("notDestinationIps")
        ),
        destination_ports=tuple(item.port() for item in items("destinationPorts")),
        not_destination_ports=tuple(item.port() for item in items("notDestinationPorts")),
    )


def _principal(field: Field) -> StringMatch:
    match = _string_match(field)
    if match.kind in (MatchKind.EXACT, MatchKind.PREFIX) and match.value.startswith(SCHEME):
        raise field.error(
            f"{match.value!r} can match nobody: principals are written without {SCHEME}",
            f"write {match.value.removeprefix(SCHEME)}",
        )
    return match


def _string_match(field: Field) -> StringMatch:
    """`!Exact text`, as Rust's YAML writes it, or `{Exact: text}`, as JSON does."""
    form = "one of !Exact, !Prefix, !Suffix, !Presence (or a mapping like Exact: text)"
    if field.node.tag:
        name, value = field.node.tag.removeprefix("!"), field.untagged()
    elif isinstance(field.node, Scalar | Sequence):
        raise field.error(f"expected {form}")
    else:
        fields = field.record(tuple(_KINDS))
        if len(fields) != 1:
            raise field.error(f"expected {form}, just one")
        name, value = next(iter(fields.items()))
    kind = _KINDS.get(name)
    if kind is None:
        raise field.error(f"expected {form}, found !{name}")
    if kind is not MatchKind.PRESENCE:
        return StringMatch(kind, value.text(empty=True))
    if not value.is_null and list(value.items()):
        raise value.error("Presence takes no value")
    return StringMatch(kind)


def _account(field: Field) -> ServiceAccountMatch:
    fields = field.record(("namespace", "serviceAccount"))
    return ServiceAccountMatch(
        field.need(fields, "namespace").text(), field.need(fields, "serviceAccount").text()
    )
