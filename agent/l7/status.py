"""What a controller writes into the status of Gateways, routes and policies.

Conditions as Gateway API v1 defines them, from the same plans that waypoints
go by: what a waypoint would log as not in force is False here, with the field
and the reason. Entries of other controllers are left as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meshbpf.agent.core.address import IPAddress
from meshbpf.agent.core.kube_names import NETWORKING
from meshbpf.agent.core.objects import KubeObject
from meshbpf.agent.core.workload import HBONE_PORT
from meshbpf.agent.l7.deployment import CONTROLLER
from meshbpf.agent.l7.planner import ROUTE_KINDS
from meshbpf.agent.l7.problem import Problem
from meshbpf.agent.l7.references import GATEWAY_API

POLICY_CONDITION = "meshbpf.io/WaypointAccepted"
"""Of Istio's kinds. Istio's own `WaypointAccepted` is istiod's to write."""

_MESSAGE_LIMIT = 2048  # the schema takes 32,768; whoever reads needs the first few
_ROUTE_CONDITIONS = ("Accepted", "ResolvedRefs")
_PARENT_GROUPS = {"Service": ("", "core"), "ServiceEntry": (NETWORKING,)}
_PARENT_FIELDS = ("group", "kind", "namespace", "name", "sectionName", "port")


@dataclass(frozen=True, slots=True)
class Condition:
    """One `metav1.Condition`, but for its time and generation."""

    type: str
    status: bool
    reason: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Deployed:
    """What became of a Gateway's objects."""

    hostname: str
    """Of its Service."""
    addresses: tuple[IPAddress, ...] = ()
    ready: int = 0
    """Pods that serve."""
    failure: str = ""
    """Why one of its objects could not be applied."""


def merged(
    before: Iterable[Mapping[str, Any]], wanted: Iterable[Condition], generation: int, now: str
) -> list[dict[str, Any]]:
    """`wanted` among the conditions that are there; a time changes with its status alone."""
    found = {str(each.get("type")): dict(each) for each in before}
    for each in wanted:
        old = found.get(each.type, {})
        status = "True" if each.status else "False"
        same = old.get("status") == status
        found[each.type] = {
            "type": each.type,
            "status": status,
            "reason": each.reason,
            "message": each.message[:_MESSAGE_LIMIT],
            "observedGeneration": generation,
            "lastTransitionTime": old.get("lastTransitionTime", now) if same else now,
        }
    return list(found.values())


def class_status(gateway_class: KubeObject, now: str) -> dict[str, Any]:
    """Of the GatewayClass."""
    accepted = Condition("Accepted", True, "Accepted", "waypoints of this class are run")
    return _with_conditions(gateway_class, (accepted,), now)


def gateway_status(gateway: KubeObject, deployed: Deployed, now: str) -> dict[str, Any]:
    """Of a Gateway of our class.

    It has addresses once a pod of it has been ready, and keeps them: istiod
    binds nothing to a Gateway without, and a waypoint that is down for a while
    must not let traffic go round it.
    """
    before = _status(gateway)
    hbone = any(map(_is_hbone, _listeners(gateway)))
    addresses = [dict(each) for each in before.get("addresses") or ()]
    if (deployed.ready or addresses) and hbone:
        addresses = _addresses(deployed) or addresses
    accepted, programmed = _gateway_conditions(hbone, deployed, bool(addresses))
    status = _with_conditions(gateway, (accepted, programmed), now)
    old = {str(each.get("name")): each for each in before.get("listeners") or ()}
    status["listeners"] = [
        _listener_status(gateway, each, old.get(str(each.get("name")), {}), programmed, now)
        for each in _listeners(gateway)
    ]
    return status | {"addresses": addresses}


def _gateway_conditions(
    hbone: bool, deployed: Deployed, addressed: bool
) -> tuple[Condition, Condition]:
    if not hbone:
        what = f"a waypoint needs a listener with protocol HBONE at port {HBONE_PORT}"
        return (
            Condition("Accepted", False, "ListenersNotValid", what),
            Condition("Programmed", False, "Invalid", what),
        )
    accepted = Condition("Accepted", True, "Accepted", "a waypoint is run for it")
    if deployed.failure:
        return accepted, Condition("Programmed", False, "Invalid", deployed.failure)
    if not addressed:
        what = "no pod of the waypoint is ready yet"
        return accepted, Condition("Programmed", False, "AddressNotAssigned", what)
    what = f"{deployed.ready} of its pods serve"
    return accepted, Condition("Programmed", True, "Programmed", what)


def _listener_status(
    gateway: KubeObject,
    listener: Mapping[str, Any],
    before: Mapping[str, Any],
    programmed: Condition,
    now: str,
) -> dict[str, Any]:
    generation = _generation(gateway)
    if not _is_hbone(listener):
        what = f"a waypoint takes HBONE at port {HBONE_PORT} and nothing else"
        wrong = Condition("Accepted", False, "UnsupportedProtocol", what)
        conditions = [wrong, Condition("Programmed", False, "Invalid", what)]
        kinds: Collection[str] = ()
    else:
        accepted = Condition("Accepted", True, "Accepted")
        conditions = [
            accepted,
            Condition("Programmed", programmed.status, programmed.reason, programmed.message),
        ]
        allowed = (listener.get("allowedRoutes") or {}).get("kinds") or ()
        asked = [str(each.get("kind")) for each in allowed]
        kinds = [kind for kind in asked or ROUTE_KINDS if kind in ROUTE_KINDS]
        strange = sorted(set(asked) - set(kinds))
        resolved = Condition("ResolvedRefs", True, "ResolvedRefs")
        if strange:
            what = f"a waypoint has no routes of kind {', '.join(strange)}"
            resolved = Condition("ResolvedRefs", False, "InvalidRouteKinds", what)
        conditions.append(resolved)
    return {
        "name": str(listener.get("name")),
        # Routes are attached to Services, and to listeners none.
        "attachedRoutes": 0,
        "supportedKinds": [{"group": GATEWAY_API, "kind": kind} for kind in kinds],
        "conditions": merged(before.get("conditions") or (), conditions, generation, now),
    }


def route_status(
    route: KubeObject,
    bound: Collection[tuple[str, str, str]],
    problems: Sequence[Problem],
    now: str,
) -> dict[str, Any] | None:
    """Of a route with parents among `bound`, what our waypoints serve (kind, namespace, name).

    None where we have nothing to say, and have said nothing before.
    """
    before = [dict(each) for each in _status(route).get("parents") or ()]
    ours = {_identity(each["parentRef"]): each for each in before if _is_own(each)}
    entries = []
    for index, parent in enumerate(_parents(route)):
        if not _is_bound(parent, route, bound):
            continue
        reference = {key: parent[key] for key in _PARENT_FIELDS if key in parent}
        old = ours.get(_identity(reference), {})
        conditions = _route_conditions(problems, f"spec.parentRefs[{index}]")
        entries.append(
            {
                "parentRef": reference,
                "controllerName": CONTROLLER,
                "conditions": merged(
                    old.get("conditions") or (), conditions, _generation(route), now
                ),
            }
        )
    if not entries and not ours:
        return None
    return {"parents": [*(each for each in before if not _is_own(each)), *entries]}


def _route_conditions(problems: Sequence[Problem], place: str) -> list[Condition]:
    """For one parent: its own problems, and those of the route itself."""
    mine = [
        each
        for each in problems
        if not each.field.startswith("spec.parentRefs[") or each.field.startswith(place)
    ]
    return [
        _judged(kind, [each for each in mine if each.condition == kind])
        for kind in _ROUTE_CONDITIONS
    ]


def policy_status(policy: KubeObject, problems: Sequence[Problem], now: str) -> dict[str, Any]:
    """Of a policy that is attached to a destination of our waypoints."""
    found = _judged("Accepted", problems)
    told = Condition(POLICY_CONDITION, found.status, found.reason, found.message)
    return _with_conditions(policy, (told,), now)


def _judged(kind: str, problems: Sequence[Problem]) -> Condition:
    if not problems:
        return Condition(kind, True, kind)
    # The API has a word for what a field says that cannot be.
    reason = "UnsupportedValue" if problems[0].reason == "Invalid" else problems[0].reason
    return Condition(kind, False, reason, "; ".join(map(_told, problems)))


def _told(problem: Problem) -> str:
    return f"{problem.field}: {problem.what}" if problem.field else problem.what


def _with_conditions(
    about: KubeObject, conditions: Iterable[Condition], now: str
) -> dict[str, Any]:
    before = _status(about).get("conditions") or ()
    return {"conditions": merged(before, conditions, _generation(about), now)}


def _status(about: KubeObject) -> Mapping[str, Any]:
    return about.body.get("status") or {}


def _generation(about: KubeObject) -> int:
    return int(about.metadata.get("generation") or 0)


def _listeners(gateway: KubeObject) -> Sequence[Mapping[str, Any]]:
    return gateway.spec.get("listeners") or ()


def _is_hbone(listener: Mapping[str, Any]) -> bool:
    return listener.get("protocol") == "HBONE" and listener.get("port") == HBONE_PORT


def _addresses(deployed: Deployed) -> list[dict[str, Any]]:
    if not deployed.addresses:
        return []
    return [
        # First, since an address may be given anew: readers prefer it.
        {"type": "Hostname", "value": deployed.hostname},
        *({"type": "IPAddress", "value": str(each)} for each in deployed.addresses),
    ]


def _parents(route: KubeObject) -> Sequence[Mapping[str, Any]]:
    found = route.spec.get("parentRefs") or ()
    return [each if isinstance(each, Mapping) else {} for each in found]


def _is_bound(
    parent: Mapping[str, Any], route: KubeObject, bound: Collection[tuple[str, str, str]]
) -> bool:
    kind = str(parent.get("kind"))
    if parent.get("group", "") not in _PARENT_GROUPS.get(kind, ()):
        return False
    return (kind, str(parent.get("namespace") or route.namespace), str(parent.get("name"))) in bound


def _is_own(entry: Mapping[str, Any]) -> bool:
    return entry.get("controllerName") == CONTROLLER


def _identity(parent: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(parent.get(key, "")) for key in _PARENT_FIELDS)
