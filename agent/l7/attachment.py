"""What a policy is attached to at a waypoint.

AuthorizationPolicy, RequestAuthentication, Telemetry, WasmPlugin and
TrafficExtension all say it alike: `targetRefs` (or the older single
`targetRef`). A policy without them, with or without a selector, is for
workloads and is left to the node's proxies, as Istio has it
(pilot/pkg/model/policyattachment.go).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from meshbpf.agent.core.objects import ObjectKey
from meshbpf.agent.l7.sources import Scope
from meshbpf.agent.l7.spec import Value

TARGET_FIELDS = ("selector", "targetRef", "targetRefs")


class TargetKind(StrEnum):
    """What may be named in `targetRefs`."""

    SERVICE = "Service"
    SERVICE_ENTRY = "ServiceEntry"
    GATEWAY = "Gateway"
    GATEWAY_CLASS = "GatewayClass"


_GROUPS = {
    TargetKind.SERVICE: ("", "core"),
    TargetKind.SERVICE_ENTRY: ("networking.istio.io",),
    TargetKind.GATEWAY: ("gateway.networking.k8s.io",),
    TargetKind.GATEWAY_CLASS: ("gateway.networking.k8s.io",),
}


@dataclass(frozen=True, slots=True)
class Target:
    """One target; always in the policy's own namespace, a class in none."""

    kind: TargetKind
    name: str


def applies(scope: Scope, policy: ObjectKey, targets: Iterable[Target]) -> bool:
    """Whether a policy of that key and those targets holds at the destination."""
    for target in targets:
        if scope.targets({"kind": target.kind.value, "name": target.name}, policy.namespace):
            return True
        # Istio's class stands for every waypoint of the mesh: a policy on it
        # must not fall away where one of ours takes the place of one of theirs.
        if target == _EVERY_WAYPOINT and policy.namespace == scope.root_namespace:
            return True
    return False


_EVERY_WAYPOINT = Target(TargetKind.GATEWAY_CLASS, "istio-waypoint")


def read_targets(fields: Mapping[str, Value]) -> tuple[Target, ...]:
    """The targets that an object's spec names; empty when it is not for waypoints."""
    references = [*fields["targetRefs"].items()] if "targetRefs" in fields else []
    if not references and "targetRef" in fields:
        references = [fields["targetRef"]]
    if references and "selector" in fields:
        raise fields["selector"].error("cannot stand beside targetRefs")
    return tuple(filter(None, map(_target, references)))


def _target(reference: Value) -> Target | None:
    fields = reference.record(("group", "kind", "name", "namespace", "sectionName"))
    kind = reference.need(fields, "kind").choice({kind.value: kind for kind in TargetKind})
    group = fields["group"].text(empty=True) if "group" in fields else ""
    if group not in _GROUPS[kind]:
        raise reference.error(f"{kind} is in the group {_GROUPS[kind][0] or 'core'}, not {group!r}")
    if "namespace" in fields:
        named = fields["namespace"].text(empty=True)
        if named not in ("", reference.object.namespace):
            raise fields["namespace"].error("a policy applies in its own namespace only")
    if "sectionName" in fields:
        raise fields["sectionName"].error("is not supported for policies")
    return Target(kind, reference.need(fields, "name").text())
